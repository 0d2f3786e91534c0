"""topd::linear_divergence: per-token divergences from hidden states and heads, gradients made in the same pass.

value_n = D(p_T, p_S)_n + hard_weight (-log p_S(token_n)); the gradient of sum_n g_n value_n is linear in g. Forward keeps
u_n = d value_n / d hidden_n, and sums the head's gradients under the weights that the caller will probably use (the hint,
or 1). Backward is d hidden = g ⊙ u, exact for every g; for the head it takes c = median(g / hint): rows with g = c hint are
done, rows that deviate are computed again and corrected, or, where fewer rows have a gradient at all, the sums start anew.

Precision: tiles, u and the head's gradients are float32 (float64 for float64), cast once when returned. Cost: 4 matrix
products (3 with a frozen head), 2 + 1 more for each deviating row. Read per token and head: as the matrix products do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks import token_range
from topd.ops.tiles import HeadGrads, Side, TileLoop
from topd.plan import EAGER_TEMPORARIES, default_workspace, plan_chunks
from topd.reference import NO_SECOND_DERIVATIVE, RowSpec
from topd.scores import FIELDS


def _side_schema(side: str) -> str:
    return (
        f"Tensor {side}_hidden, Tensor {side}_weight, Tensor? {side}_bias, Tensor? {side}_a, Tensor? {side}_b, "
        f"float {side}_scaling, "
    )


_COMMON = (
    _side_schema("student")
    + _side_schema("teacher")
    + "Tensor? mask, Tensor? tokens, float student_scale, float? student_softcap, float teacher_scale, "
    "float? teacher_softcap, float temperature, str divergence, float parameter, float hard_weight, "
    "int? workspace_bytes, str backend, "
)
_NEEDS = "bool hidden_grad, bool weight_grad, bool bias_grad, bool adapter_grad"
_HEAD_GRADS = "Tensor weight, Tensor bias, Tensor a, Tensor b"


class Call(NamedTuple):
    """The arguments that forward and backward share, unpacked from the ops' flat list."""

    student: Side
    teacher: Side
    mask: Tensor | None
    tokens: Tensor | None
    spec: RowSpec
    workspace_bytes: int | None
    backend: str

    @classmethod
    def unpack(cls, flat: tuple[Any, ...]) -> "Call":
        return cls(Side(*flat[:6]), Side(*flat[6:12]), flat[12], flat[13], RowSpec(*flat[14:22]), flat[22], flat[23])

    @property
    def dtype(self) -> torch.dtype:
        hidden = torch.promote_types(self.student.hidden.dtype, self.teacher.hidden.dtype)
        return torch.promote_types(hidden, torch.float32)

    @property
    def vocab(self) -> int:
        return min(self.student.weight.shape[0], self.teacher.weight.shape[0])

    def loop(self, chosen: Tensor | None, *, full_width: bool = False) -> TileLoop:
        """The chunk loop over the chosen rows (None: all)."""
        n = self.student.hidden.shape[0] if chosen is None else chosen.numel()
        widths = (self.student.weight.shape[0], self.teacher.weight.shape[0]) if full_width else (self.vocab, self.vocab)
        plan = plan_chunks(
            n,
            *widths,
            itemsize=self.dtype.itemsize,
            workspace_bytes=self.workspace_bytes or _default_workspace(self.student.hidden.device),
            temporaries=EAGER_TEMPORARIES if self.backend == "eager" else 0,
        )
        return TileLoop(
            self.student,
            self.teacher,
            self.tokens,
            self.spec,
            plan,
            self.backend,
            chosen=chosen,
            dtype=self.dtype,
            full_width=full_width,
        )


N_COMMON = 24


def _default_workspace(device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return default_workspace(device.type, free)


torch.library.define(
    "topd::linear_divergence",
    f"({_COMMON}Tensor? weights_hint, {_NEEDS}, bool scores) -> "
    f"(Tensor value, Tensor scores, Tensor u, {_HEAD_GRADS}, Tensor hint)",
)
torch.library.define(
    "topd::linear_divergence_backward",
    f"(Tensor grad_value, {_COMMON}Tensor u, {_HEAD_GRADS}, Tensor hint, bool uniform_hint, {_NEEDS}) -> "
    f"(Tensor hidden, {_HEAD_GRADS})",
)


def _chosen_rows(mask: Tensor | None) -> Tensor | None:
    """Indices of the unmasked rows, None for all. On a GPU this waits for the mask; what it saves are whole rows of matrix
    products."""
    if mask is None:
        return None
    chosen = mask.nonzero()[:, 0]
    return None if chosen.numel() == mask.numel() else chosen


def _normalised_hint(hint: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """[N] in the tile's dtype, largest magnitude 1; 0 where masked or not finite."""
    hint = torch.ones_like(like) if hint is None else hint.to(like.dtype, copy=True)
    hint.masked_fill_(~hint.isfinite(), 0.0)
    if mask is not None:
        hint.masked_fill_(~mask, 0.0)
    if hint.numel():
        top = hint.abs().max()
        hint.div_(torch.where(top > 0, top, torch.ones_like(top)))
    return hint


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON])
    hint, hidden_grad, weight_grad, bias_grad, adapter_grad, scores = flat[N_COMMON:]
    student = call.student
    n, device = student.hidden.shape[0], student.hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        value = torch.zeros(n, dtype=call.dtype, device=device)
        found = value.new_zeros(len(FIELDS) if scores else 0, n)
        u = value.new_zeros((n, student.hidden.shape[1]) if hidden_grad else (0, 0))
        grads = HeadGrads.empty(
            student, call.vocab, call.dtype, call.backend, weight=weight_grad, bias=bias_grad, adapter=adapter_grad
        )
        used_hint = _normalised_hint(hint, call.mask, value) if grads.wanted else value.new_empty(0)
        chosen = _chosen_rows(call.mask)
        if call.tokens is not None:
            token_range(call.tokens if chosen is None else call.tokens[chosen], call.vocab)
        grad = hidden_grad or grads.wanted
        loop = call.loop(chosen, full_width=scores)
        if loop.plan.n == 0:
            grads.zero()
        for chunk in loop.run(grad=grad, scores=scores):
            rows, at = chunk.rows, chunk.at
            value[at] = rows.value
            if scores:
                found[:, at] = rows.scores
            if rows.grad_logits is None:
                continue
            through_adapter = loop.student.through_adapter(rows.grad_logits)
            if hidden_grad and isinstance(at, slice):
                loop.hidden_grad(rows, through_adapter, out=u[at])
            elif hidden_grad:
                u[at] = loop.hidden_grad(rows, through_adapter)
            if grads.wanted:
                weights = used_hint[at].masked_fill(~rows.finite, 0.0)
                used_hint[at] = weights
                grads.add(loop.student, rows.grad_logits, through_adapter, chunk.hidden, weights, first=chunk.start == 0)
        return value, found, u, *grads, used_hint


def _deviation(grad: Tensor, hint: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """c, and which rows do not obey grad = c hint to 4 ulp. Masked rows obey whatever comes."""
    ratio = (grad / hint).masked_fill(hint == 0, torch.nan)
    c = torch.nanmedian(ratio.masked_fill(~ratio.isfinite(), torch.nan)).nan_to_num(0.0) if grad.numel() else grad.sum()
    expected = c * hint
    obeys = (grad - expected).abs() <= 4 * torch.finfo(grad.dtype).eps * expected.abs()
    return c, ~obeys if mask is None else ~obeys & mask


def _cancels(call: Call, grad: Tensor, c: Tensor, hint: Tensor, redo: Tensor, alive: Tensor) -> bool:
    """Whether correcting would subtract rows so much larger than what stays that digits are lost: a hint far off, or a row
    with an outlying hidden state. What a row adds is measured by its weight times the norm of its hidden state."""
    size = torch.linalg.vector_norm(call.student.hidden, dim=-1, dtype=grad.dtype).nan_to_num_()
    removed, kept = (c * hint).abs() * size, (grad.abs() * size).nan_to_num_()
    return bool(removed[redo].max() > 4 * kept[alive].max())


def _head_grads(call: Call, grad: Tensor, saved: HeadGrads, hint: Tensor, uniform_hint: bool) -> HeadGrads:
    """Exact sums under grad, fresh tensors in the tile's dtype."""
    if uniform_hint and call.mask is None and grad.numel() and grad.stride(0) == 0:
        # An expanded scalar, as sum() and mean() send it: no row deviates and the host need not wait. A row without a
        # distribution (its hint was set to 0) still poisons the sums, as it would in eager code.
        c = grad[0]
        return saved.times(torch.where((hint == 0).any() & (c != 0), torch.nan, c), call.backend)
    c, deviates = _deviation(grad, hint, call.mask)
    # The host waits here for a count; on a GPU that costs microseconds, and spares the matrix products of the rows that obey.
    redo = deviates.nonzero()[:, 0]
    if redo.numel() == 0:
        return saved.times(c, call.backend)
    alive = (grad != 0 if call.mask is None else (grad != 0) & call.mask).nonzero()[:, 0]
    anew = redo.numel() >= alive.numel() or _cancels(call, grad, c, hint, redo, alive)
    if anew:
        grads, weights, redo = saved.unfilled(call.backend), grad, alive
    else:
        grads, weights = saved.times(c, call.backend), grad - c * hint
    loop = call.loop(redo)
    for chunk in loop.run(grad=True, scores=False):
        grad_logits = chunk.rows.grad_logits
        assert grad_logits is not None
        row_weights = weights[chunk.at].masked_fill(~chunk.rows.finite, torch.nan)
        through_adapter = loop.student.through_adapter(grad_logits)
        grads.add(loop.student, grad_logits, through_adapter, chunk.hidden, row_weights, first=anew and chunk.start == 0)
    return grads


def _returned(total: Tensor, like: Tensor | None) -> Tensor:
    """A sum as the gradient of `like`: its dtype, and zeros beyond the common vocabulary."""
    if like is None or total.numel() == 0 or total.shape == like.shape:
        return total if like is None else total.to(like.dtype)
    out = like.new_zeros(like.shape)
    out[: total.shape[0]] = total
    return out


def _backward(grad_value: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON])
    u, *saved, hint, uniform_hint, hidden_grad = flat[N_COMMON : N_COMMON + 8]
    student = call.student
    with torch.no_grad(), torch.autocast(grad_value.device.type, enabled=False):
        hidden = u.new_empty(0)
        if hidden_grad:
            hidden = (u * grad_value.unsqueeze(-1)).masked_fill_(grad_value.unsqueeze(-1) == 0, 0.0).to(student.hidden.dtype)
        grads = HeadGrads(*saved)
        if grads.wanted:
            grads = _head_grads(call, grad_value, grads, hint, uniform_hint)
        tensors = (student.weight, student.bias, student.a, student.b)
        return hidden, *(_returned(total, like) for total, like in zip(grads, tensors, strict=True))


for _op, _implementation in (("linear_divergence", _forward), ("linear_divergence_backward", _backward)):
    torch.library.impl(f"topd::{_op}", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::linear_divergence")
def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON])
    _, hidden_grad, weight_grad, bias_grad, adapter_grad, scores = flat[N_COMMON:]
    student, n = call.student, call.student.hidden.shape[0]
    value = student.hidden.new_empty(n, dtype=call.dtype)
    grads = HeadGrads.empty(student, call.vocab, call.dtype, "", weight=weight_grad, bias=bias_grad, adapter=adapter_grad)
    return (
        value,
        value.new_empty(len(FIELDS) if scores else 0, n),
        value.new_empty((n, student.hidden.shape[1]) if hidden_grad else (0, 0)),
        *grads,
        value.new_empty(n if weight_grad or bias_grad or adapter_grad else 0),
    )


@torch.library.register_fake("topd::linear_divergence_backward")
def _backward_fake(grad_value: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    student, needs = Call.unpack(flat[:N_COMMON]).student, flat[-4:]
    likes = (student.hidden, student.weight, student.bias, student.a, student.b)
    wanted = (needs[0], needs[1], needs[2], needs[3], needs[3])
    return tuple(
        like.new_empty(like.shape) if want and like is not None else grad_value.new_empty(0)
        for like, want in zip(likes, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scores, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scores, *kept)
    common = inputs[:N_COMMON]
    ctx.tensors_at = [i for i, argument in enumerate(common) if isinstance(argument, Tensor)]
    ctx.others = [None if isinstance(argument, Tensor) else argument for argument in common]
    ctx.save_for_backward(*(common[i] for i in ctx.tensors_at), *kept)
    ctx.uniform_hint, ctx.needs, ctx.n_inputs = (
        inputs[N_COMMON] is None,
        inputs[N_COMMON + 1 : N_COMMON + 5],
        len(inputs),
    )


def _gradient(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out: list[Any] = [None] * ctx.n_inputs
    if grad_value is None:
        return tuple(out)
    tensors = ctx.saved_tensors
    common, count = list(ctx.others), len(ctx.tensors_at)
    for i, saved in zip(ctx.tensors_at, tensors[:count], strict=True):
        common[i] = saved
    grads = torch.ops.topd.linear_divergence_backward(grad_value, *common, *tensors[count:], ctx.uniform_hint, *ctx.needs)
    hidden, weight, bias, adapter = ctx.needs
    for i, wanted in enumerate((hidden, weight, bias, adapter, adapter)):
        if wanted:
            out[i] = grads[i]
    return tuple(out)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


torch.library.register_autograd("topd::linear_divergence", _gradient, setup_context=_setup_context)
torch.library.register_autograd("topd::linear_divergence_backward", _no_second_derivative)
