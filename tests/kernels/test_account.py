"""The static account: its bytes are those that the kernels touch, and the plan is the best that it knows."""

import pytest
import torch

from tools.account import FLOP, GIB, SHAPES, STATISTICS, SWEEP, _products, plan_of
from topd.ops.shared.plan import MAX_PILE
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.shared.launch import interpreted

VOCAB = 16_384


@pytest.fixture
def watch():
    if not interpreted(statistics):
        pytest.skip("the kernels run on a GPU here; counting needs Triton's interpreter")
    from tools.watched import run_watched

    return run_watched


@pytest.mark.parametrize("divergence", SWEEP)
def test_bytes_and_flop_are_those_of_the_kernels(divergence, watch):
    student, teacher, grad = torch.randn(1, VOCAB), torch.randn(1, VOCAB), torch.empty(1, VOCAB, dtype=torch.bfloat16)
    parameter = {"forward_kl": float("inf"), "jsd": 0.5, "reverse_kl": 0.0}[divergence]
    spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, divergence, parameter, 0.0)
    kernels = watch(divergence_rows.launches(student, teacher, None, None, None, spec, grad, False)[0]).kernels
    each = {name: (read + written) / VOCAB for name, (read, written, _) in kernels.items()}
    few = 512 / VOCAB  # a row's own numbers
    assert each["statistics"] == pytest.approx(STATISTICS, abs=few)
    assert each["sweep"] == pytest.approx(SWEEP[divergence], abs=few)
    assert each["constants"] + each["finish"] < few
    flop = kernels["statistics"][2] + kernels["sweep"][2]
    assert flop / VOCAB == pytest.approx(FLOP[divergence], rel=0.02)


def test_bytes_of_logprob_rows(watch):
    product, spec = torch.randn(1, VOCAB), logprob_rows.Spec(1.0, None, 1.0)
    launches, _ = logprob_rows.launches(product, None, torch.tensor([[3, 5]]), spec, None, product, False)
    kernels = watch(launches).kernels
    assert kernels["rest"][0] / VOCAB == pytest.approx(4, abs=0.02)
    assert (kernels["gradient"][0] + kernels["gradient"][1]) / VOCAB == pytest.approx(8, abs=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("workspace", [GIB // 2, 2 * GIB, 8 * GIB])
def test_no_other_plan_within_the_workspace_has_less_traffic(shape, weight_grad, workspace):
    products = _products(shape, weight_grad)[1]
    chosen = plan_of(shape, workspace, weight_grad=weight_grad)
    assert chosen.workspace_bytes <= workspace
    best = products.bytes_per_column(chosen.rows, chosen.pile)
    for chunks in range(1, 200):
        rows = -(-shape.n // chunks)
        for pile in range(1, min(chunks, MAX_PILE) + 1):
            if rows * shape.vocab * (8 + 2 * pile) <= workspace:
                assert products.bytes_per_column(rows, pile) >= best - 1e-9


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_prediction_of_the_default_loss_is_within_its_target(shape):
    from tools.account import DEVICES, ratio

    for device in DEVICES:
        assert ratio(shape, device, "reverse_kl", 2 * GIB, weight_grad=True) <= 1.45
