"""linear_logprobs, and the weighted sums of rows in its gradients, on "triton" beside float64: at the widths of models on a
GPU, small in the interpreter."""

from typing import Any

import pytest
import torch
from compare import TENSORS, Model, Outcome
from gpu_cases import DTYPES, EACH_SIZE, NARROW, SIZES, Size, assert_outcome, on_device_only, problem_of, upstream_of
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON

import topd
from topd_kernels import register
from topd_kernels.weighted_gather.launches import weighted_gather
from topd_kernels.weighted_scatter.launches import weighted_scatter

pytestmark = NEEDS_TRITON

# Ids of a row (None: the size's), further options of the call, and the options of the head.
SIMPLE, SOME, ENTROPY = (1, {}, {}), (None, {}, {}), (None, {"entropy": True}, {})
REPEATED = (None, {"repeats": True}, {})
HEAD = {"student": {"bias": True, "softcap": 6.0}}
EVERYTHING = (None, {"entropy": True, "repeats": True, "mask": True, "temperature": 0.7}, HEAD)
Case = tuple[tuple[int | None, dict[str, Any], dict[str, Any]], torch.dtype]
# Those of the interpreter come first.
CASES: list[Case] = [
    (EVERYTHING, torch.float32),
    *((ENTROPY, dtype) for dtype in NARROW),
    *((SIMPLE, dtype) for dtype in DTYPES),
    *((each, torch.float32) for each in (SOME, REPEATED, ENTROPY)),
]
HERE = on_device_only(CASES, 4)


def values_of(leaves: Model, ids: Tensor, call: dict[str, Any], mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Return the log-probabilities [N, M] and, where asked for, the entropy [N] by topd."""
    options |= {"temperature": call.get("temperature", 1.0), "mask": mask, "return_entropy": "entropy" in call}
    values = topd.linear_logprobs(leaves.hidden, leaves.head(), ids, **options)
    return values if isinstance(values, tuple) else (values,)


def textbook(leaves: Model, ids: Tensor, call: dict[str, Any], mask: Tensor | None) -> tuple[Tensor, ...]:
    """Return the same from full logits."""
    logprobs = (leaves.logits() / call.get("temperature", 1.0)).log_softmax(-1)
    values = [logprobs.gather(-1, ids), *([-(logprobs.exp() * logprobs).sum(-1)] if "entropy" in call else [])]
    if mask is None:
        return tuple(values)
    return tuple(value.masked_fill(~mask.view(-1, *[1] * (value.dim() - 1)), 0.0) for value in values)


def check_logprobs(size: Size, case: Case, number: int) -> None:
    (count, call, head), dtype = case
    problem = problem_of(size, head, dtype)
    ids = torch.randint(size.vocab, (size.rows, count or size.ids), device=DEVICE)
    if "repeats" in call:
        ids[:, 1::2] = ids[:, :-1:2]
    mask = torch.arange(size.rows, device=DEVICE) % 3 != 1 if "mask" in call else None
    row = upstream_of(size.rows, number)
    # One number for all ids where it is one for all rows: the gradient is then an expanded scalar.
    each = (
        row[:1].expand(ids.shape)
        if number % 3 == 0
        else row.unsqueeze(-1) * torch.linspace(0.5, 1, ids.shape[1], device=DEVICE)
    )
    upstream = [each, 0.3 * row.abs()][: 1 + ("entropy" in call)]

    def outcome(wide: torch.dtype, compute: Any, **options: Any) -> Outcome:
        leaves = problem.student.leaves(TENSORS, wide)
        values = compute(leaves, ids, call, mask, **options)
        torch.autograd.backward(values, [grad.to(value.dtype) for grad, value in zip(upstream, values, strict=True)])
        grads = {name: tensor.grad for name in TENSORS if (tensor := getattr(leaves, name)) is not None}
        return Outcome(torch.cat([value.detach().reshape(-1) for value in values]), grads)

    ours = outcome(dtype, values_of, backend="triton", workspace_bytes=size.workspace_bytes)
    yardstick = outcome(torch.float32, values_of, backend="reference")
    assert_outcome(ours, yardstick, outcome(torch.float64, textbook), dtype)


@EACH_SIZE
@pytest.mark.parametrize("number", range(len(HERE)))
def test_values_and_gradients(number, size):
    check_logprobs(size, HERE[number], number)


@EACH_SIZE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [weighted_gather, weighted_scatter], ids=["gather", "scatter"])
def test_weighted_sums_of_rows(op, dtype, size):
    """The bound is the classical one of a sum in order: (terms + 2) eps over the sum of the terms' magnitudes."""
    ids = torch.randint(-1, size.vocab + 1, (size.rows, size.ids), device=DEVICE)
    ids[:, 0] = 3
    weights = torch.randn(size.rows, size.ids, device=DEVICE)
    table, states = (torch.randn(rows, size.student_width, device=DEVICE) for rows in (size.vocab, size.rows))
    inside = (ids >= 0) & (ids < size.vocab)
    kept, safe = torch.where(inside, weights, 0.0).double(), torch.where(inside, ids, 0)
    out, source = (states, table.to(dtype)) if op is weighted_gather else (table, states.to(dtype))
    sums = out.clone()
    op(sums, source, ids, weights)

    def added(start: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        if op is weighted_gather:
            return start + torch.einsum("nm,nmh->nh", factors, rows[safe])
        terms = (factors.unsqueeze(-1) * rows.unsqueeze(1)).reshape(-1, rows.shape[1])
        return start.index_add(0, safe.reshape(-1), terms)

    true = added(out.double(), source.double(), kept)
    magnitude = added(out.double().abs(), source.double().abs(), kept.abs())
    most = size.ids if op is weighted_gather else int(safe[inside].bincount().max())
    assert ((sums.double() - true).abs() <= (most + 2) * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's kernels are the dispatcher's, which has no test double")
@pytest.mark.parametrize("op", ["logprob_rows", "weighted_gather", "weighted_scatter"])
def test_a_wrong_kernel_is_noticed(op, monkeypatch):
    """A thousandth too much in its first result, or in what it was to add to, is more than any bound allows."""
    right = register.LAUNCHERS[op]

    def wrong(*arguments):
        results = right(*arguments)
        (arguments if results is None else results)[0].mul_(1.001)
        return results

    check_logprobs(SIZES[0], CASES[0], 2)
    monkeypatch.setitem(register.LAUNCHERS, op, wrong)
    with pytest.raises(AssertionError):
        check_logprobs(SIZES[0], CASES[0], 2)
