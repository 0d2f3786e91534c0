"""What the tests of the Triton kernels share: the kernels on given tiles, on a GPU or through the interpreter, results on the
CPU; the reference on the same tiles; and the yardstick, eager torch's own float32."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import TENSORS, Model, Outcome, Problem, by_topd
from torch import Tensor

import topd
from topd.ops.linear_divergence.eager import divergence_rows as reference_divergence
from topd.ops.linear_divergence.loop import plan_of as plan_of_call
from topd.ops.linear_divergence.spec import Call, Rows, RowSpec
from topd.ops.linear_logprobs.eager import logprob_rows as reference_logprobs
from topd.ops.linear_logprobs.spec import LogprobRows, LogprobSpec
from topd.ops.shared.engines import TRITON
from topd.ops.shared.plan import ChunkPlan
from topd.ops.shared.tiles import Side
from topd.scores import FIELDS

pytest.importorskip("triton", reason="triton is not installed")

from topd_kernels import register
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.shared import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAN_RUN = DEVICE.type == "cuda" or register.interpreted()
NEEDS_TRITON = pytest.mark.skipif(not CAN_RUN, reason="CPU tensors need TRITON_INTERPRET=1 when the kernels are defined")

KINDS = [
    ("forward_kl", math.inf),
    ("forward_kl", 0.05),
    ("reverse_kl", 0.0),
    ("jsd", 0.3),
    ("jsd", 0.5),
    ("skew_kl", 0.1),
    ("skew_reverse_kl", 0.1),
    ("total_variation", 0.0),
]
PLAIN = LogprobSpec(1.0, None, 1.0)
# The logits of compare's problems reach 50, which float32 knows to 3e-6; products and sums add their own.
FLOAT32 = 3e-5
# What storing a float32 in 16 bits changes, relative and (float16, below its normal numbers) absolute. A GPU rounds to the
# nearest; Triton's interpreter cuts bfloat16 off.
STORED = {torch.bfloat16: (2**-9 if DEVICE.type == "cuda" else 2**-8, 0.0), torch.float16: (2**-11, 2**-25)}
F64 = torch.float64


def spec_of(divergence: str, parameter: float = 0.0, **numbers: Any) -> RowSpec:
    return RowSpec(1.0, None, 1.0, None, 1.0, divergence, parameter, 0.0)._replace(**numbers)


def there(value: Tensor | None) -> Tensor | None:
    """A copy on the device, with the strides it has."""
    return None if value is None else torch.empty_like(value, device=DEVICE).copy_(value)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels store it: on a GPU to the nearest; Triton's interpreter cuts the bits off that bfloat16 has not."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        value = (value.view(torch.int32) & -65536).view(torch.float32)
    return value.to(dtype)


def divergence_by_triton(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    grad: torch.dtype | str | None = "in place",
    scores: bool = True,
    splits: int | None = None,
    blocks: divergence_rows.Blocks | None = None,
) -> Rows:
    """grad: where the gradient goes, a tile of its own of this dtype or the student's; None: nowhere."""
    tiles = there(student), there(teacher)
    to = tiles[0] if grad == "in place" else None
    if isinstance(grad, torch.dtype):
        to = torch.full(student.shape, torch.nan, dtype=grad, device=DEVICE)
    biases = there(student_bias), there(teacher_bias)
    numbers = divergence_rows.Spec(*spec)
    cut = {"splits": splits, "blocks": blocks}
    order, out = divergence_rows.launches(*tiles, *biases, there(tokens), numbers, to, scores, **cut)
    launch.run_all(order)
    unchanged = [tiles[1].cpu(), teacher] + ([tiles[0].cpu(), student] if to is not tiles[0] else [])
    for after, given in zip(unchanged[::2], unchanged[1::2], strict=True):
        torch.testing.assert_close(after, given, rtol=0, atol=0, equal_nan=True, msg="a tile that is only read")
    return Rows(*(part.cpu() for part in out), None if to is None else to.cpu())


def divergence_truth(student: Tensor, teacher: Tensor, spec: RowSpec, dtype: torch.dtype | None = F64, **rest) -> Rows:
    """The reference on the same tiles; dtype None: in theirs, the yardstick."""
    cast = {name: x if dtype is None or name == "tokens" else x.to(dtype) for name, x in rest.items() if x is not None}
    sides = (student, teacher) if dtype is None else (student.to(dtype), teacher.to(dtype))
    operands = [cast.get(name) for name in ("student_bias", "teacher_bias", "tokens")]
    return reference_divergence(*sides, *operands, spec, grad=True, scores=True)


def logprobs_by_triton(
    product: Tensor,
    ids: Tensor,
    spec: LogprobSpec = PLAIN,
    *,
    bias: Tensor | None = None,
    grad: torch.dtype | str | None = "in place",
    entropy: bool = True,
    splits: int | None = None,
    blocks: logprob_rows.Blocks | None = None,
) -> LogprobRows:
    """As `divergence_by_triton`; the entropy's gradient goes into a tile of the same dtype."""
    tile = there(product)
    own = isinstance(grad, torch.dtype)
    to = torch.full(product.shape, torch.nan, dtype=grad, device=DEVICE) if own else tile if grad else None
    second = torch.full_like(to, torch.nan) if grad and entropy else None
    numbers = logprob_rows.Spec(*spec)
    cut = {"splits": splits, "blocks": blocks}
    order, out = logprob_rows.launches(tile, there(bias), there(ids), numbers, second, to, entropy, **cut)
    launch.run_all(order)
    return LogprobRows(*(part.cpu() for part in out), *(None if x is None else x.cpu() for x in (to, second)))


def logprobs_truth(
    product: Tensor,
    ids: Tensor,
    spec: LogprobSpec = PLAIN,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = F64,
) -> LogprobRows:
    dtype = dtype or product.dtype
    return reference_logprobs(product.to(dtype), None if bias is None else bias.to(dtype), ids, spec, grad=True, entropy=True)


def random_logits(rows: int, student_vocab: int, teacher_vocab: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Rows from nearly equal to far apart, some peaked, offsets between the sides included."""
    student = torch.randn(rows, student_vocab, dtype=torch.float64) * torch.linspace(0.3, 9, rows).unsqueeze(-1)
    teacher = torch.randn(rows, teacher_vocab, dtype=torch.float64) * 3
    vocab = min(student_vocab, teacher_vocab)
    near = torch.arange(rows) % 3 == 0
    noise = 10.0 ** -torch.arange(rows).remainder(5).unsqueeze(-1)
    teacher[near, :vocab] = (student[:, :vocab] + noise * torch.randn(rows, vocab))[near]
    return student.to(dtype), (teacher + 40.0 * (torch.arange(rows) % 4 == 1).unsqueeze(-1)).to(dtype)


def assert_as_good(result: Tensor, yardstick: Tensor, truth: Tensor, what: str, rounding: Tensor | float = 0.0) -> None:
    """Rows [C] or [C, V]: what is not finite agrees, and each element is as near to the truth as the yardstick's, but for 3e-6
    of its row's largest and `rounding` [C, 1], to which the row's inputs of the last step are known."""
    assert result.dtype == yardstick.dtype, what
    rows = [x.double().reshape(x.shape[0], *(x.shape[1:] or (1,))) for x in (result, yardstick, truth)]
    known = rows[2].isfinite()
    torch.testing.assert_close(rows[0][~known], rows[2][~known], rtol=0, atol=0, equal_nan=True, msg=what)
    near, eager, true = (x.masked_fill(~known, 0.0) for x in rows)
    if not true.numel():
        return
    allowed = (eager.nan_to_num() - true).abs() + 3e-6 * true.abs().amax(-1, keepdim=True) + rounding
    excess = ((near - true).abs() / allowed.clamp_min(1e-300)).max().item()
    assert excess <= 1, f"{what}: an element is {excess:.3g} times as wrong as allowed"


def assert_divergence(result: Rows, student: Tensor, teacher: Tensor, spec: RowSpec, **rest: Tensor | None) -> None:
    """All of a result in its own dtype: float64 to rounding, float32 as good as eager torch's. p_S - p_T from two rounded
    probabilities is known to 2 ulp of the largest."""
    true = divergence_truth(student, teacher, spec, **rest)
    eager = divergence_truth(student, teacher, spec, None, **rest)
    assert torch.equal(result.finite, true.finite)
    if student.dtype == torch.float64:
        close = torch.testing.assert_close
        close(result.value, true.value, rtol=1e-11, atol=1e-14, equal_nan=True)
        if result.grad_logits is not None:
            close(result.grad_logits, true.grad_logits, rtol=1e-10, atol=1e-14)
        if result.scores.shape[0]:
            close(result.scores, true.scores, rtol=1e-11, atol=1e-14, equal_nan=True)
        return
    # The total variation is linear where the KLs are quadratic: near equality it is known as the probabilities are.
    assert_as_good(result.value, eager.value, true.value, "value", 1e-7 if spec.divergence == "total_variation" else 0.0)
    largest = torch.maximum(*(x.double().softmax(-1).amax(-1, keepdim=True).nan_to_num() for x in (student, teacher)))
    # Its gradient jumps where the sides are equal.
    sure = true.value > 1e-2 if spec.divergence == "total_variation" else torch.ones_like(true.finite)
    grads = [rows.grad_logits[sure] for rows in (result, eager, true)]
    assert_as_good(*grads, "gradient", largest[sure] * 2**-22)
    for i, name in enumerate(FIELDS if result.scores.shape[0] else ()):
        assert_as_good(result.scores[i], eager.scores[i], true.scores[i], name)


def assert_logprobs(
    result: LogprobRows, product: Tensor, ids: Tensor, spec: LogprobSpec = PLAIN, *, bias: Tensor | None = None
) -> None:
    """As `assert_divergence`, of what the result holds."""
    true, eager = logprobs_truth(product, ids, spec, bias=bias), logprobs_truth(product, ids, spec, bias=bias, dtype=None)
    assert torch.equal(result.finite, true.finite)
    assert torch.equal(result.first, true.first)
    for name in ("logprobs", "entropy", "outside", "slope", "outside_grad", "entropy_grad"):
        value, expected, yardstick = (getattr(rows, name) for rows in (result, true, eager))
        if value is None or (name == "entropy" and value.shape == (0,)):
            continue
        assert value.shape == expected.shape, name
        if not value.numel():
            continue
        if product.dtype == torch.float64:
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14, equal_nan=True, msg=name)
        elif name in ("logprobs", "slope"):  # each is a number of its own; rows of one
            assert_as_good(value.reshape(-1), yardstick.reshape(-1), expected.reshape(-1), name)
        else:  # the logarithm of the mass outside is known absolutely
            assert_as_good(value, yardstick, expected, name, 3e-6 if name == "outside" else 0.0)


def true_dlogits(problem: Problem) -> Tensor:
    """d value / d product [N, V] in float64, through unit hidden states."""
    exact = problem.to(torch.float64)
    side = exact.student
    through = Model(
        F.linear(side.hidden, side.weight), torch.eye(side.weight.shape[0], dtype=torch.float64, device=DEVICE), side.bias
    )
    unit = replace(exact, student=replace(through, scale=side.scale, softcap=side.softcap))
    rows = side.hidden.shape[0]
    return by_topd(unit, "reference", torch.ones(rows, device=DEVICE), trainable=("hidden",)).grads["hidden"]


def assert_within(result: Tensor, true: Tensor, allowed: Tensor, what: str) -> None:
    """Check each element within `allowed`, rounding to the result's dtype, and float32's own error."""
    slack = allowed + true.abs() * torch.finfo(result.dtype).eps + FLOAT32 * true.abs().max()
    excess = ((result.double() - true).abs() / slack).max().item()
    assert excess <= 1, f"{what}: an element is {excess:.3g} times as wrong as allowed"


def plan_of(problem: Problem, workspace_bytes: int) -> ChunkPlan:
    """The plan that a call without scores makes."""
    sides = [Side(model.hidden, model.weight, None, None, None, 1.0) for model in (problem.student, problem.teacher)]
    call = Call(*sides, None, None, spec_of("reverse_kl"), workspace_bytes, TRITON)
    return plan_of_call(call, problem.student.hidden.shape[0])


def logprob_outcome(
    model: Model, ids: Tensor, backend: str, upstream: list[Tensor], dtype: torch.dtype, **options: Any
) -> Outcome:
    """Log-probabilities, and with two upstream gradients the entropy too."""
    leaves = model.leaves(TENSORS, dtype)
    options = {"return_entropy": len(upstream) == 2, "backend": backend, **options}
    values = topd.linear_logprobs(leaves.hidden, leaves.head(), ids, **options)
    values = values if isinstance(values, tuple) else (values,)
    torch.autograd.backward(values, [grad.to(values[0].dtype) for grad in upstream])
    grads = {name: tensor.grad for name in TENSORS if (tensor := getattr(leaves, name)) is not None}
    return Outcome(torch.cat([x.detach().reshape(-1) for x in values]), grads)
