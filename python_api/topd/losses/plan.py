"""What a call of linear_divergence will do, told before it runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topd.backends import choose_backend
from topd.checks.values import FLOATING, LARGEST_INT, check_workspace
from topd.divergences import ReverseKL
from topd.head import Head
from topd.losses.linear_divergence import spec_of
from topd.losses.operands import cast, needs, op_side
from topd.memory import size_text
from topd.ops.linear_divergence.loop import plan_of
from topd.ops.linear_divergence.op import outline
from topd.ops.linear_divergence.spec import Call, Inputs, Outputs
from topd.ops.shared.differentiable import unfilled_gradients
from topd.ops.shared.engines import engine_of
from topd.ops.shared.plan import ChunkPlan
from topd.ops.shared.tiles import HeadGrads, Needs

TFLOP = 1e12


@dataclass(frozen=True)
class Plan:
    """What a call of `linear_divergence` and its backward pass do; `print` shows it.

    Attributes:
        tokens: rows N.
        vocab: entries that are compared.
        device, backend: where it runs, and by what.
        product_dtype: in which the student's matrix products take their operands; their sums are float32 (float64).
        rows, chunks: rows of the largest chunk, and how many chunks there are.
        pile: chunks whose gradients go through one product together.
        workspace_bytes: what the tiles of a chunk take, and the gradients that wait.
        kept_bytes: what stays from forward to backward: the values, d hidden for an upstream gradient of 1, and the sums for
            the student's head.
        grad_bytes: the gradients that backward returns.
        peak_bytes: the most that is allocated at a time beyond the inputs, about; the gradients are in it.
        flop: floating-point operations of the matrix products, under one upstream gradient for all rows, or a right hint.
        memory_known: False where it runs on a GPU that is not here, so that the workspace has no bound by its memory.
    """

    tokens: int
    vocab: int
    device: torch.device
    backend: str
    product_dtype: torch.dtype
    rows: int
    chunks: int
    pile: int
    workspace_bytes: int
    kept_bytes: int
    grad_bytes: int
    peak_bytes: int
    flop: int
    memory_known: bool

    def __str__(self) -> str:
        pile = "" if self.pile == 1 else f", gradients of {self.pile} chunks to a product"
        unknown = "" if self.memory_known else " (as much as it can use: the memory of the GPU is not known here)"
        product = str(self.product_dtype).removeprefix("torch.")
        return "\n".join(
            (
                f"linear_divergence of {self.tokens:,} tokens, vocabulary {self.vocab:,}, on {self.device}, backend "
                f'"{self.backend}", products in {product}',
                f"chunks      {self.chunks:,} of up to {self.rows:,} rows{pile}",
                f"workspace   {size_text(self.workspace_bytes)}{unknown}",
                f"kept        {size_text(self.kept_bytes)} from forward to backward",
                f"gradients   {size_text(self.grad_bytes)}",
                f"peak        about {size_text(self.peak_bytes)} beyond the inputs",
                f"products    {self.flop / TFLOP:,.3g} Tflop",
            )
        )


def plan(
    student: Head | nn.Module,
    teacher: Head | nn.Module,
    tokens: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> Plan:
    """Return what a call of `linear_divergence` will do, without running it: the reverse KL, no mask, no scores, gradients to
    the hidden states and to what requires grad of the student's head. Other divergences are planned alike, masked rows count
    as none.

    Args:
        student, teacher: a Head each, or a transformers model, whose head is read; of the tensors shapes and dtypes count. Both
            may be sharded. Then the plan is of the tokens that this rank holds, and nothing is asked of the other ranks: a call
            takes the chunks of the rank with the most tokens, in the smallest workspace of the group. Plan it there.
        tokens: rows N, an int >= 0.
        device: where the call will run, None: where the student's head is. "cuda" may stand for a GPU that is not here.
        dtype: in which both sides will come, as under torch.autocast; None: in those of their heads.
        workspace_bytes: as in `linear_divergence`.

    Returns:
        A Plan, from the very functions that the call will ask. The default workspace of a GPU depends on the memory that is
        available at that moment.

    Raises:
        TypeError, ValueError: a wrong type, dtype, device or range, named in the message.
    """
    heads = {"student": _head("student", student), "teacher": _head("teacher", teacher)}
    sharded = _sharded(heads)
    _check_tokens(tokens)
    check_workspace(workspace_bytes)
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, FLOATING))}, got {dtype!r}")
    device = _device(device, heads["student"])
    unseen = device.type == "cuda" and not torch.cuda.is_available()
    backend = "eager" if sharded else "triton" if unseen else choose_backend(None, device)

    with torch.enable_grad():
        needed = needs(torch.empty(0, device="meta", requires_grad=True), heads["student"])
    sides = []
    for head in heads.values():
        head = _without_data(head)
        hidden = head.weight.new_empty(tokens, head.weight.shape[1])
        sides.append(op_side(*((hidden, head) if dtype is None else cast(hidden, head, dtype))))
    spec = spec_of(heads["student"], heads["teacher"], 1.0, ReverseKL(), 0.0)
    call = Call(sides[0], sides[1], None, None, spec, workspace_bytes, engine_of(backend))
    chunks = plan_of(call, tokens, weight_grad=needed.weight, device=device)
    outputs = outline(Inputs(call, None, needed, keep=True, scores=False), device)
    grads = unfilled_gradients(call.student, needed, call.dtype)
    return Plan(
        tokens=tokens,
        vocab=call.vocab,
        device=device,
        backend=backend,
        product_dtype=call.backend.product_dtype(call.student.weight.dtype, call.dtype, device),
        rows=chunks.rows,
        chunks=chunks.chunks,
        pile=chunks.pile,
        workspace_bytes=chunks.workspace_bytes,
        kept_bytes=_bytes_of(outputs),
        grad_bytes=_bytes_of(grads),
        peak_bytes=_peak(call, chunks, outputs, grads, device),
        flop=_flop(call, needed),
        memory_known=not unseen,
    )


def _peak(call: Call, chunks: ChunkPlan, outputs: Outputs, grads: tuple[Tensor, HeadGrads], device: torch.device) -> int:
    """Return about the most bytes beyond the inputs, in forward or in backward: what is copied or made anew there of the size
    of a head, of all rows or of a pile."""
    engine, tile, sums = call.backend, call.dtype.itemsize, outputs.kept.grads
    kept, (hidden_grad, head_grads) = _bytes_of(outputs), grads
    forward = kept + chunks.workspace_bytes - _bytes_of(outputs.kept.dlogits)
    for side in (call.student, call.teacher):
        if engine.product_dtype(side.weight.dtype, call.dtype, device) != side.weight.dtype:
            forward += call.vocab * side.weight.shape[1] * tile
    if sums.wanted:  # weighted hidden states
        forward += chunks.pile * chunks.rows * call.student.hidden.shape[1] * tile

    casts = call.student.weight.dtype != call.dtype
    scaled = 0 if casts and engine.like_a_gpu(device) else sum(grad.numel() for grad in head_grads) * tile
    cast_hidden, cast_head = (_bytes_of(each) if casts else 0 for each in (hidden_grad, head_grads))
    rows = hidden_grad.numel() * tile
    backward = kept + max(rows + cast_hidden, (cast_hidden if casts else rows) + scaled + cast_head)
    return max(forward, backward)


def _flop(call: Call, needed: Needs) -> int:
    """Return the floating-point operations of the matrix products, adapters apart."""
    (n, width), teacher_width = call.student.hidden.shape, call.teacher.hidden.shape[1]
    return 2 * n * call.vocab * (width * (2 + needed.weight) + teacher_width)


def _head(name: str, value: object) -> Head:
    if isinstance(value, Head):
        return value
    if isinstance(value, nn.Module):
        return Head.from_model(value, verify=False)
    raise TypeError(f"{name} must be a topd.Head or a transformers model, got {type(value).__name__}")


def _sharded(heads: dict[str, Head]) -> bool:
    """Return whether the heads are sharded, both of them; refuse a shard of which a rank cannot tell what it will do."""
    shards = {name: head.shard for name, head in heads.items() if head.shard is not None}
    if len(shards) == 1:
        raise ValueError(
            f"student and teacher must both be sharded, or both whole, got a shard of {next(iter(shards))} alone; give both "
            "shard=topd.VocabShard(...) over the same group"
        )
    for name, shard in shards.items():
        if shard.sequence_parallel:
            raise ValueError(
                f"{name}.shard must have sequence_parallel=False to be planned, got True: chunks are cut from the rows of all "
                "ranks; plan these, tokens times the number of ranks, with sequence_parallel=False"
            )
        if not shard.held(heads[name].weight.shape[0]):
            raise ValueError(
                f"{name} must hold a token on this rank to be planned, got none from {shard.start} on of {shard.vocab}; plan "
                "on the rank that holds most, whose chunks all ranks take"
            )
    return bool(shards)


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens must be an int, how many rows there are, got {type(tokens).__name__}")
    if not 0 <= tokens <= LARGEST_INT:
        raise ValueError(f"tokens must be >= 0 and fit in 64 bits, got {tokens}")


def _device(device: object, student: Head) -> torch.device:
    """Return the device that was asked for."""
    if device is None:
        device = student.weight.device
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be None, a str or a torch.device, got {type(device).__name__}")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must name a device of torch, got {device!r}") from error
    if chosen.type == "meta":
        raise ValueError('device must be one that computes, got "meta", where the student\'s head is; pass device="cuda"')
    return chosen


def _without_data(head: Head) -> Head:
    """Return the head on the meta device; of a sharded one the rows that count."""
    if head.shard is not None:
        head = head.first(head.shard.held(head.weight.shape[0]))
    bias = None if head.bias is None else head.bias.detach().to("meta")
    adapter = head.adapter
    if adapter is not None:
        adapter = type(adapter)(adapter.a.detach().to("meta"), adapter.b.detach().to("meta"), adapter.scaling)
    return Head(head.weight.detach().to("meta"), bias, scale=head.scale, softcap=head.softcap, adapter=adapter)


def _bytes_of(tensors: Any) -> int:
    """Return the bytes of a tensor, or of all in a record of them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.itemsize
    return sum(map(_bytes_of, tensors))
