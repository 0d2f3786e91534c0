"""Teacher states in another memory than the student: only the rows of a chunk are copied to the student, without waiting.

A machine without a GPU has one memory. So a stand-in says that it is elsewhere, and notes each copy.
"""

import pytest
import torch
from compare import assert_near, random_problem

import topd
from topd.losses.linear_divergence import spec_of
from topd.losses.operands import op_side
from topd.ops.linear_divergence.loop import Loop
from topd.ops.linear_divergence.spec import Call
from topd.ops.shared.engines import engine_of


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, "cpu:1"; `to` notes what it copies, and gives plain rows."""

    copies: list[tuple[int, torch.device, bool]]

    @property
    def device(self):
        return torch.device("cpu:1")

    def __getitem__(self, index):
        return elsewhere(self.as_subclass(torch.Tensor)[index], self.copies)

    def to(self, device, non_blocking=False):
        self.copies.append((self.shape[0], device, non_blocking))
        return self.as_subclass(torch.Tensor)


def elsewhere(values, copies):
    states = values.as_subclass(Elsewhere)
    states.copies = copies
    return states


@pytest.mark.parametrize("masked", [False, True])
def test_the_rows_of_a_chunk_are_copied_when_it_is_computed(masked):
    problem = random_problem({}, n=23)
    student, teacher = (topd.Head(side.weight.detach()) for side in (problem.student, problem.teacher))
    sides = op_side(problem.student.hidden.detach(), student), op_side(problem.teacher.hidden, teacher)
    spec = spec_of(student, teacher, 1.0, topd.ReverseKL(), 0.0)
    call = Call(*sides, None, None, spec, 20_000, engine_of("eager"))
    chosen = torch.tensor([0, 2, 3, 7, 11, 15, 16, 17, 21, 22]) if masked else None
    expected = [chunk.rows.value for chunk in loop_of(call, chosen)]

    copies = []
    states = elsewhere(problem.teacher.hidden, copies)
    values = []
    for number, chunk in enumerate(loop_of(call._replace(teacher=call.teacher._replace(hidden=states)), chosen), start=1):
        values.append(chunk.rows.value)
        assert len(copies) == number
    assert len(copies) > 2
    assert [rows for rows, *_ in copies] == [value.numel() for value in expected]
    assert all(device == torch.device("cpu") and non_blocking for _, device, non_blocking in copies)
    assert_near(torch.cat(values), torch.cat(expected).double(), 0.0)


def loop_of(call, chosen):
    return Loop(call, chosen, grad=False, weight_grad=False, scores=False)


def test_cpu_states_are_taken_beside_another_device():
    """On "meta", where nothing is computed: what is checked, and the shapes."""
    student, teacher = (topd.Head(torch.empty(31, width, device="meta")) for width in (6, 5))
    value = topd.linear_divergence(torch.empty(2, 3, 6, device="meta"), student, torch.randn(2, 3, 5), teacher)
    assert value.shape == (2, 3)
    assert value.device == torch.device("meta")


def test_what_is_still_refused():
    student = topd.Head(torch.empty(31, 6, device="meta"))
    hidden = torch.empty(4, 6, device="meta")
    with pytest.raises(ValueError, match=r"teacher\.weight is on cpu, but student_hidden is on meta"):
        topd.linear_divergence(hidden, student, torch.randn(4, 5), topd.Head(torch.randn(31, 5)))
    with pytest.raises(ValueError, match="teacher_hidden is on meta, but student_hidden is on cpu"):
        topd.linear_divergence(torch.randn(4, 6), topd.Head(torch.randn(31, 6)), hidden, topd.Head(torch.randn(31, 6)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_pinned_states_give_what_states_on_the_gpu_give(backend, masked):
    draw = torch.Generator().manual_seed(0)
    hidden, states = torch.randn(300, 64, generator=draw).cuda(), torch.randn(300, 48, generator=draw)
    weight = torch.randn(997, 64, generator=draw).cuda().requires_grad_()
    teacher = topd.Head(torch.randn(997, 48, generator=draw).cuda())
    options = {"backend": backend, "workspace_bytes": 1_000_000, "return_scores": False}
    options["mask"] = (torch.rand(300, generator=draw) < 0.5).cuda() if masked else None
    results = []
    for teacher_hidden in (states.cuda(), states.pin_memory(), states):
        for context in (torch.autocast("cuda", enabled=False), torch.autocast("cuda", torch.bfloat16)):
            weight.grad = None
            with context:
                value = topd.linear_divergence(hidden, topd.Head(weight), teacher_hidden, teacher, **options)
            value.sum().backward()
            results.append((value.detach(), weight.grad))
    for number, (value, grad) in enumerate(results):
        assert torch.equal(value, results[number % 2][0])
        assert torch.equal(grad, results[number % 2][1])
