"""topd::linear_divergence: per-token divergences from hidden states and heads, gradients made in the same pass.

value_n = D(p_T, p_S)_n + hard_weight (-log p_S(token_n)); the gradient of sum_n g_n value_n is linear in g. Forward keeps
u_n = d value_n / d hidden_n, and sums the head's gradients under the weights that the caller will probably use (the hint,
or 1). Backward is d hidden = g ⊙ u, exact for every g; for the head it takes c = median(g / hint): rows with g = c hint are
done, rows that deviate are computed again and corrected, or, where fewer rows have a gradient at all, the sums start anew.

Precision: tiles, u and the head's gradients are float32 (float64 for float64), cast once when returned; on a GPU the gradients
to 16-bit products are rounded to 16 bits. Cost: 4 matrix
products (3 with a frozen head), 2 + 1 more for each deviating row. Read per token and head: as the matrix products do.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.backends import kernel
from topd.checks import in_vocabulary
from topd.ops.advise_huge_pages import buffer
from topd.ops.divergence_rows import run_rows
from topd.ops.one_pass import (
    at_inputs,
    chosen_rows,
    common_factor,
    correction,
    normalised_hint,
    refuse_second_derivative,
    returned,
    save_call,
    saved_call,
    unfilled_gradients,
    workspace,
)
from topd.ops.score_tokens import run_scores, serves
from topd.ops.tiles import HeadGrads, Side, product_dtype
from topd.plan import EAGER_TEMPORARIES, ChunkPlan, Products, plan_chunks, prefers_fused
from topd.reference.linear_divergence import COMMON_VOCABULARY, Rows, RowSpec
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


class Gradients(NamedTuple):
    """The gradients to the products of one or more chunks: where their rows stand among the N, the student's hidden states
    there, dlogits [P, V], which rows have a distribution; `first`: none came before."""

    at: slice | Tensor
    hidden: Tensor
    grad_logits: Tensor
    finite: Tensor
    first: bool


class Chunk(NamedTuple):
    """One chunk's results; `at` is where its rows stand among the N. `gradients` come with the last chunk of a pile, and live
    in a tile that is overwritten after it."""

    at: slice | Tensor
    rows: Rows
    gradients: Gradients | None


class TileLoop:
    """Iterates over chunks of the chosen rows; the tiles are allocated once and reused. Per chunk: two matrix products into the
    tiles, then `divergence_rows`."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: Tensor | None,
        spec: RowSpec,
        plan: ChunkPlan,
        backend: str,
        *,
        chosen: Tensor | None,
        dtype: torch.dtype,
        full_width: bool,
    ) -> None:
        self.vocab = min(student.weight.shape[0], teacher.weight.shape[0])
        widths = (student.weight.shape[0], teacher.weight.shape[0]) if full_width else (self.vocab, self.vocab)
        self.student = student.widened(widths[0], dtype, backend)
        self.teacher = teacher.widened(widths[1], dtype, backend)
        self.tokens, self.spec, self.chosen = tokens, spec, chosen
        self.plan, self.backend, self.dtype = plan, backend, dtype

    def run(self, *, grad: bool, scores: bool) -> Iterator[Chunk]:
        """Each chunk's results."""
        tiles = [
            buffer((self.plan.rows, side.weight.shape[0]), side.weight, self.dtype, self.backend)
            for side in (self.student, self.teacher)
        ]
        narrow = self.student.weight.dtype
        piled = None
        if grad and narrow != self.dtype:
            width = -(-tiles[0].shape[1] // 8) * 8  # each row begins on 16 bytes, as its stores and products like it
            piled = tiles[0].new_empty(self.plan.pile * self.plan.rows, width, dtype=narrow)[:, : tiles[0].shape[1]]
        for pile in self.plan.piles():
            begin, finite = pile[0][0], []
            for start, stop in pile:
                grad_tile = None if piled is None else piled[start - begin : stop - begin]
                at, rows = self._rows(start, stop, tiles, grad_tile, grad=grad, scores=scores)
                finite.append(rows.finite)
                gradients = None
                if rows.grad_logits is not None and stop == pile[-1][1]:
                    made = rows.grad_logits if piled is None else piled[: stop - begin]
                    where = self._at(begin, stop)
                    exists = finite[0] if len(finite) == 1 else torch.cat(finite)
                    gradients = Gradients(where, self.student.hidden[where], made[:, : self.vocab], exists, begin == 0)
                yield Chunk(at, rows, gradients)

    def _at(self, start: int, stop: int) -> slice | Tensor:
        return slice(start, stop) if self.chosen is None else self.chosen[start:stop]

    def _rows(
        self, start: int, stop: int, tiles: list[Tensor], grad_tile: Tensor | None, *, grad: bool, scores: bool
    ) -> tuple[slice | Tensor, Rows]:
        at = self._at(start, stop)
        student_product, teacher_product = (tile[: stop - start] for tile in tiles)
        self.student.multiply(self.student.hidden[at], student_product)
        self.teacher.multiply(self.teacher.hidden[at], teacher_product)
        tokens = None if self.tokens is None else self.tokens[at]
        operands = (student_product, teacher_product, self.student.bias, self.teacher.bias, tokens)
        return at, run_rows(self.backend, *operands, self.spec, grad=grad, scores=scores, grad_tile=grad_tile)


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

    @property
    def products(self) -> Products | None:
        """What the plan must know where gradients have a tile of their own."""
        sides = (self.student.weight, self.teacher.weight)
        own, other = (product_dtype(weight.dtype, self.dtype, weight.device, self.backend) for weight in sides)
        if own == self.dtype:
            return None
        widths = (self.student.hidden.shape[1], self.teacher.hidden.shape[1])
        return Products(*widths, own.itemsize, other.itemsize, own.itemsize, weight_grad=True)

    @property
    def fused(self) -> bool:
        """Whether a kernel can go straight from hidden states to scores, the value among them."""
        value_is_a_score = (self.spec.divergence, self.spec.parameter) in FUSED_VALUES and not self.spec.hard_weight
        return self.backend == "triton" and value_is_a_score and serves(self.student, self.teacher)

    def fused_scores(self, at: slice | Tensor) -> Tensor:
        """Scores [9, N'] of the rows `at`."""
        student, teacher = (side._replace(hidden=side.hidden[at]) for side in (self.student, self.teacher))
        run = kernel("score_tokens", self.backend, student.hidden.device)
        return run_scores(run, student, teacher, None if self.tokens is None else self.tokens[at], self.spec)

    def loop(self, chosen: Tensor | None, *, full_width: bool = False) -> TileLoop:
        """The chunk loop over the chosen rows (None: all)."""
        n = self.student.hidden.shape[0] if chosen is None else chosen.numel()
        widths = (self.student.weight.shape[0], self.teacher.weight.shape[0]) if full_width else (self.vocab, self.vocab)
        plan = plan_chunks(
            n,
            *widths,
            itemsize=self.dtype.itemsize,
            workspace_bytes=workspace(self.student.hidden.device, self.workspace_bytes),
            temporaries=EAGER_TEMPORARIES if self.backend == "eager" else 0,
            products=self.products,
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
# Divergences with their parameters that are scores themselves.
FUSED_VALUES = (("forward_kl", float("inf")), ("reverse_kl", 0.0))


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
        used_hint = normalised_hint(hint, call.mask, value) if grads.wanted else value.new_empty(0)
        chosen = chosen_rows(call.mask)
        if call.tokens is not None:
            in_vocabulary("tokens", call.tokens if chosen is None else call.tokens[chosen], call.vocab, COMMON_VOCABULARY)
        grad = hidden_grad or grads.wanted
        loop = call.loop(chosen, full_width=scores)
        if scores and not grad and call.fused and prefers_fused(loop.plan):
            at = slice(None) if chosen is None else chosen
            found[:, at] = call.fused_scores(at)
            return found[FIELDS.index(call.spec.divergence)].clone(), found, u, *grads, used_hint
        if loop.plan.n == 0:
            grads.zero()
        for chunk in loop.run(grad=grad, scores=scores):
            value[chunk.at] = chunk.rows.value
            if scores:
                found[:, chunk.at] = chunk.rows.scores
            if (made := chunk.gradients) is None:
                continue
            through_adapter = loop.student.through_adapter(made.grad_logits)
            if hidden_grad and isinstance(made.at, slice):
                loop.student.hidden_grad(made.grad_logits, through_adapter, made.finite, out=u[made.at])
            elif hidden_grad:
                u[made.at] = loop.student.hidden_grad(made.grad_logits, through_adapter, made.finite)
            if grads.wanted:
                weights = used_hint[made.at].masked_fill(~made.finite, 0.0)
                used_hint[made.at] = weights
                sums = (loop.student, made.grad_logits, through_adapter, made.hidden, weights)
                grads.add(*sums, first=made.first, normalised=True)
        return value, found, u, *grads, used_hint


def _head_grads(call: Call, grad: Tensor, saved: HeadGrads, hint: Tensor, uniform_hint: bool) -> HeadGrads:
    """Exact sums under grad, fresh tensors in the tile's dtype."""
    if uniform_hint and call.mask is None and grad.numel() and grad.stride(0) == 0:
        # An expanded scalar, as sum() and mean() send it: no row deviates and the host need not wait. A row without a
        # distribution (its hint was set to 0) still poisons the sums, as it would in eager code.
        c = grad[0]
        return saved.times(torch.where((hint == 0).any() & (c != 0), torch.nan, c), call.backend)
    c = common_factor(grad, hint)
    expected = c * hint
    deviates, alive = (grad - expected).abs() <= 4 * torch.finfo(grad.dtype).eps * expected.abs(), grad != 0
    deviates.logical_not_()
    if call.mask is not None:  # masked rows obey whatever comes
        deviates, alive = deviates & call.mask, alive & call.mask
    found = correction(saved, call.student, c, hint, grad, deviates, alive, call.backend, narrow=call.products is not None)
    loop = call.loop(found.rows)
    for chunk in loop.run(grad=True, scores=False):
        if (made := chunk.gradients) is None:
            continue
        through_adapter = loop.student.through_adapter(made.grad_logits)
        first = found.anew and made.first
        sums = (loop.student, made.grad_logits, through_adapter, made.hidden)
        for alpha, weights in found.terms:
            row_weights = weights[made.at].masked_fill(~made.finite, torch.nan)
            found.grads.add(*sums, row_weights, first=first, alpha=alpha, normalised=weights is hint)
    return found.grads


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
        return hidden, *(returned(total, like) for total, like in zip(grads, tensors, strict=True))


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
    return unfilled_gradients(Call.unpack(flat[:N_COMMON]).student, flat[-4:], grad_value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scores, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scores, *kept)
    save_call(ctx, inputs, N_COMMON, kept)
    ctx.uniform_hint, ctx.needs = inputs[N_COMMON] is None, inputs[N_COMMON + 1 : N_COMMON + 5]


def _gradient(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_value is None:
        return at_inputs(ctx, None)
    common, kept = saved_call(ctx)
    return at_inputs(ctx, torch.ops.topd.linear_divergence_backward(grad_value, *common, *kept, ctx.uniform_hint, *ctx.needs))


torch.library.register_autograd("topd::linear_divergence", _gradient, setup_context=_setup_context)
refuse_second_derivative("linear_divergence")
