"""What c d weight, in the weight's 16 bits, takes on its way out of the backward pass of linear_divergence."""

import compare
import pytest
import torch
from compare import by_topd, random_problem
from memory_watch import Watch
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON, STORED

import topd

pytestmark = NEEDS_TRITON
N, VOCAB = 6, 19


def gradient(dtype: torch.dtype, upstream: Tensor, hint: Tensor | None) -> tuple[Tensor, list[torch.dtype]]:
    """The gradient to the weight, and the dtypes of the tensors of its shape that the backward pass makes."""
    torch.manual_seed(1)
    problem = random_problem({}, topd.ReverseKL(), n=N, vocab=VOCAB).to(DEVICE).to(dtype)
    student = problem.student.leaves(("weight",))
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    tensors: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> None:
        if tensor.shape == student.weight.shape:
            tensors[tensor.data_ptr()] = tensor  # kept, so that no other takes its place

    with Watch(see):
        value = topd.linear_divergence(*sides, weights_hint=hint, backend="triton")
    before = {student.weight.data_ptr(), *tensors}
    with Watch(see):
        (grad,) = torch.autograd.grad(value, student.weight, upstream)
    tensors = {pointer: tensor for pointer, tensor in tensors.items() if pointer not in before}
    return grad, [tensor.dtype for tensor in tensors.values()]


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("given", ["mean", "hint"])
def test_it_is_scaled_and_rounded_in_one_pass(given, dtype):
    """No float32 d weight beside the one that forward keeps, whose rounding is the only one."""
    hint = None if given == "mean" else torch.rand(N, device=DEVICE) + 0.5
    upstream = torch.full((), -1 / 3, device=DEVICE).expand(N) if hint is None else hint * 8
    result, dtypes = gradient(dtype, upstream, hint)
    assert result.dtype == dtype
    assert dtypes == [dtype]
    # A second row's upstream of its own forbids it: there is a correction to be added first.
    other = upstream.clone()
    other[1] *= -2
    assert torch.float32 in gradient(dtype, other, hint)[1]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_beyond_the_common_vocabulary_there_is_zero(side):
    problem = random_problem({side: {"vocab": 23, "bias": True}}, topd.JSD(), n=N, vocab=VOCAB).to(DEVICE).to(torch.bfloat16)
    upstream = torch.full((), 0.7, device=DEVICE).expand(N)
    result = by_topd(problem, "triton", upstream)
    true = by_topd(problem.to(torch.float64), "reference", upstream.double())
    for name, expected in true.grads.items():
        # Weighted hidden states, dlogits and the result have 16 bits.
        compare.assert_near(result.grads[name].double(), expected, 3 * STORED[torch.bfloat16][0], name)
    assert not result.grads["weight"][VOCAB:].any()
