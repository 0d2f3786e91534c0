"""What c d weight, in the weight's 16 bits, takes on its way out of the backward pass of linear_logprobs."""

import pytest
import torch
from memory_watch import Watch
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON, STORED

import topd
from topd.losses.linear_logprobs import logprobs_and_outside
from topd.ops.linear_logprobs import gradient
from topd.ops.shared.engines import Triton
from topd_kernels import register

pytestmark = NEEDS_TRITON
N, VOCAB, WIDTH = 6, 80, 7
FULL = (VOCAB, WIDTH)
IDS = {
    "one": [[5], [0], [79], [5], [5], [31]],
    "two": [[5, 5], [0, 79], [79, 1], [2, 5], [5, 3], [31, 31]],
    "padded": [[5, -1], [-1, -1], [79, 0], [0, 5], [5, -1], [-1, 31]],
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """The launchers of the ops that write rows: their names, and the shapes and dtypes of what they write."""
    launched: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    kernel = Triton.kernel

    def watched(self, op, device):
        run = kernel(self, op, device)

        def noted(out, *rest):
            if isinstance(out, Tensor) and op in ("scaled_rows", "weighted_gather", "weighted_scatter"):
                launched.append((op, tuple(out.shape), out.dtype))
            return run(out, *rest)

        return noted

    monkeypatch.setattr(Triton, "kernel", watched)
    return launched


def gradients(dtype: torch.dtype, name: str, upstream: str, *, bias: bool = False) -> tuple[list[Tensor], set[torch.dtype]]:
    """The gradients to hidden, weight and bias, and the dtypes of the tensors of the weight's shape that backward makes."""
    torch.manual_seed(1)
    hidden, weight = (torch.randn(size, WIDTH, device=DEVICE).to(dtype).requires_grad_() for size in (N, VOCAB))
    head = topd.Head(weight, torch.randn(VOCAB, device=DEVICE).to(dtype).requires_grad_() if bias else None)
    leaves = [hidden, weight, *([head.bias] if bias else [])]
    ids = torch.tensor(IDS[name], device=DEVICE)
    mask = torch.arange(N, device=DEVICE) != 2 if upstream == "masked" else None
    hint = torch.linspace(0.5, 1.5, N, device=DEVICE) if upstream == "hint" else None
    options = {"mask": mask, "weights_hint": hint, "backend": "triton", "padded": name == "padded"}
    tensors: list[Tensor] = []
    watch = Watch(lambda tensor: tensors.append(tensor) if tuple(tensor.shape) == FULL else None)
    with watch:
        values, *_ = logprobs_and_outside(hidden, head, ids, **options)
    there = {weight.data_ptr(), *(tensor.data_ptr() for tensor in tensors)}
    weights = torch.full_like(values, -1 / 3) if hint is None else hint.unsqueeze(-1).expand_as(values) * 8
    if upstream == "scalar":
        weights = torch.full((), -1 / 3, device=DEVICE).expand_as(values)
    if upstream == "one row deviates":
        weights[4] *= -2
    with watch:
        grads = torch.autograd.grad(values, leaves, weights)
    return list(grads), {tensor.dtype for tensor in tensors if tensor.data_ptr() not in there}


CASES = [(name, upstream, torch.float16) for name in IDS for upstream in ("scalar", "mean", "hint", "masked")]
CASES.remove(("padded", "hint", torch.float16))  # a hint of the caller's knows nothing of padding: rows deviate


@pytest.mark.parametrize(("name", "upstream", "dtype"), [*CASES, ("one", "mean", torch.bfloat16)])
def test_one_pass_gives_the_bits_of_a_float32_d_weight(name, upstream, dtype, launched, monkeypatch):
    """One launch writes a tensor of d weight's shape, in 16 bits; before, c d weight was there in float32 too. Triton's
    interpreter cuts bfloat16 off where torch rounds it."""
    result, seen = gradients(dtype, name, upstream)
    assert seen <= {dtype}
    assert [each for each in launched if each[1] == FULL] == [("scaled_rows", FULL, dtype)]
    monkeypatch.setattr(gradient, "ANEW", VOCAB)
    launched.clear()
    expected, seen = gradients(dtype, name, upstream)
    assert torch.float32 in seen
    assert [each for each in launched if each[1] == FULL] == [("weighted_scatter", FULL, torch.float32)]
    assert result[1].dtype == dtype
    tolerance = 2 * STORED[dtype][0] if (dtype, DEVICE.type) == (torch.bfloat16, "cpu") else 0.0
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("case", ["one row deviates", "bias", "many ids"])
def test_what_else_is_added_up_in_float32_forbids_it(case, monkeypatch):
    """A row's upstream of its own, which is corrected; a bias' gradient; ids in most rows of the head."""
    if case == "many ids":
        monkeypatch.setitem(IDS, "one", [[5] * 14] * N)
    _, seen = gradients(torch.bfloat16, "one", "mean" if case != "one row deviates" else case, bias=case == "bias")
    assert torch.float32 in seen


def test_a_row_without_a_distribution_poisons_d_weight_as_before(monkeypatch):
    results = []
    for anew in (gradient.ANEW, VOCAB):
        monkeypatch.setattr(gradient, "ANEW", anew)
        hidden, weight = torch.randn(N, WIDTH, device=DEVICE).bfloat16(), torch.randn(VOCAB, WIDTH, device=DEVICE).bfloat16()
        hidden[3] = torch.nan
        weight.requires_grad_()
        values = topd.linear_logprobs(hidden, topd.Head(weight), torch.tensor(IDS["one"], device=DEVICE), backend="triton")
        results.append(torch.autograd.grad(values.sum(), weight)[0])
    assert all(result.isnan().all() for result in results)


def test_the_launchers_are_those_that_are_watched():
    assert {"scaled_rows", "weighted_gather", "weighted_scatter"} <= set(register.LAUNCHERS)
