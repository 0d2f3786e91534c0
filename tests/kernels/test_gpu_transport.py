"""The transport kernels on windows of a model's width beside float64 on the CPU; small windows in the interpreter."""

import pytest
import torch
from gpu_cases import windows_of
from triton_cases import DEVICE, NEEDS_TRITON

import topd
from topd_kernels.transport.launches import COSTS, transport

pytestmark = NEEDS_TRITON

TOLERANCE = 1e-6
WINDOWS = [(50, 50), (50, 37), (100, 80)] if DEVICE.type == "cuda" else [(5, 4)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_distances_and_plans(window, cost):
    """Both sides stop within the tolerance of the marginals: distances are at most 10 of it apart, a float32 plan's sums 1e-5
    of a marginal off."""
    table, *sides = windows_of(window)
    student, student_lengths, teacher, teacher_lengths = sides
    there = [part.to(DEVICE) for part in (table, student, student_lengths, table, teacher, teacher_lengths)]
    distance, plan, error = (part.cpu() for part in transport(*there, cost, 0.05, 400, TOLERANCE))
    true = topd.near_future_divergence(
        student,
        teacher,
        table.double(),
        student_lengths=student_lengths,
        teacher_lengths=teacher_lengths,
        cost=cost,
        max_iterations=400,
        tolerance=TOLERANCE,
    )
    largest = max(true.distance.abs().max().item(), 1e-3)
    assert (distance.double() - true.distance).abs().max().item() <= 10 * TOLERANCE * largest
    assert (error <= TOLERANCE).all()
    for sums, lengths in ((plan.double().sum(2), student_lengths), (plan.double().sum(1), teacher_lengths)):
        inside = torch.arange(sums.shape[1]) < lengths.unsqueeze(1)
        marginals = inside.double() / lengths.unsqueeze(1)
        assert ((sums - marginals).abs() * lengths.max() <= 1e-5).all()
