"""Megatron core's GPTModel with a distillation loss in the place of its logits.

GPTModel.forward of megatron-core 0.18 and later takes an `output_processor`. This is a function that gets the last hidden
states and the output layer; the forward returns its result. `output_processor` below is one. It returns the divergence from a
teacher for each token, in the shape in which Megatron returns its cross-entropy, [b, s]. No rank forms logits of the whole
vocabulary.

Megatron's shapes: s tokens of a sequence, b sequences of a micro-batch, hidden states [s, b, h]. With sequence parallelism each
rank of the tensor-parallel group has s / ranks of them.
"""

import inspect
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import check_tensor, positive_int
from topd.divergences import DivergenceLike
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.losses.sharding import shard_of
from topd.losses.shared_rows import SharedRows
from topd.options import BackendName
from topd.vocab_shard import VocabShard

KNOWN = "0.18 to 0.20"  # versions of megatron-core whose signatures were read
FORWARD_TAKES = ("output_processor", "output_processor_context")


class _Absent:
    """Stands for an argument that Megatron did not give."""

    def __repr__(self) -> str:
        return "<given by Megatron>"


ABSENT: Any = _Absent()


@dataclass(frozen=True, eq=False)
class DistillationContext:
    """What a micro-batch is compared with: pass it as GPTModel.forward's `output_processor_context`.

    Args:
        teacher_hidden: [s, b, h_t], the teacher's states after its final norm; row by row those of the student's tokens. With
            sequence parallelism also this rank's part, [s / ranks, b, h_t]. Constant.
        teacher: the teacher's Head. With tensor parallelism a shard over the same group, cut at the same tokens as the student:
            `teacher.resharded(like=output_head(...))`. Its `sequence_parallel` is not read: the output layer says it.
        vocab: the tokens of the student's tokenizer. Megatron pads the output layer; rows beyond `vocab` do not count.
        divergence, temperature, workspace_bytes, backend: as in `topd.linear_divergence`.
        hard_weight: the same; the tokens are the forward's `labels`.
        softcap: None, or the softcap of the student's logits; Megatron's own output layer has none.

    Raises:
        ImportError: megatron-core is missing, or its GPTModel.forward does not take an output processor.
        TypeError, ValueError: a wrong type, shape or range.
    """

    teacher_hidden: Tensor
    teacher: Head
    _: KW_ONLY
    vocab: int
    divergence: DivergenceLike = "reverse_kl"
    temperature: float = 1.0
    hard_weight: float = 0.0
    softcap: float | None = None
    workspace_bytes: int | None = None
    backend: BackendName | None = None

    def __post_init__(self) -> None:
        states = check_tensor("teacher_hidden", self.teacher_hidden)
        if states.dim() != 3:
            raise ValueError(f"teacher_hidden must be [s, b, h_t], as Megatron has hidden states, got {list(states.shape)}")
        if not isinstance(self.teacher, Head):
            raise TypeError(f"teacher must be a topd.Head, got {type(self.teacher).__name__}")
        positive_int("vocab", self.vocab)
        _check_forward()


def output_processor(
    *,
    hidden_states: Tensor = ABSENT,
    output_layer: Any = ABSENT,
    output_weight: Tensor | None = ABSENT,
    labels: Tensor | None = ABSENT,
    loss_mask: Tensor | None = ABSENT,
    context: DistillationContext = ABSENT,
    scale_logits: Any = ABSENT,
    config: Any = ABSENT,
    **_others: Any,
) -> Tensor:
    """Return the divergence from the teacher for each token: what GPTModel.forward calls, and returns.

    Args:
        hidden_states: [s, b, h]; with sequence parallelism this rank's part.
        output_layer: Megatron's ColumnParallelLinear.
        output_weight: the weight that the output layer shares with the embeddings, or None.
        labels: [b, s] or None; read for `hard_weight`.
        loss_mask: [b, s] or None; tokens where it is 0 cost nothing and are 0 in the result. The others are not multiplied
            by it.
        context: a DistillationContext.
        scale_logits: GPTModel's own factor of the logits, as a function of them.
        config: the TransformerConfig.

    Returns:
        [b, s] float32, nats; differentiable in hidden_states and the output layer's weight.

    Raises:
        TypeError: Megatron calls with other arguments than those above, or `context` is no DistillationContext.
        ValueError: an output layer whose logits are not those of a Head, or whose weight's gradient Megatron computes itself.
    """
    taken = {
        "hidden_states": hidden_states,
        "output_layer": output_layer,
        "output_weight": output_weight,
        "labels": labels,
        "loss_mask": loss_mask,
        "context": context,
        "scale_logits": scale_logits,
        "config": config,
    }
    _check_call([name for name, value in taken.items() if value is ABSENT])
    if not isinstance(context, DistillationContext):
        raise TypeError(
            f"output_processor_context must be a topd.integrations.megatron.DistillationContext, got {type(context).__name__}"
        )
    _check_config(config)
    scale = _factor_of(scale_logits)
    student = output_head(output_layer, output_weight, vocab=context.vocab, scale=scale, softcap=context.softcap)
    rows, own = SharedRows(shard_of(student)), hidden_states.shape[0]
    mask = None if loss_mask is None else rows.own_part(loss_mask.transpose(0, 1), own)
    tokens = rows.own_part(labels.transpose(0, 1), own) if context.hard_weight and labels is not None else None
    losses = linear_divergence(
        hidden_states,
        student,
        rows.own_part(context.teacher_hidden, own),
        _shared_alike(context.teacher, student),
        divergence=context.divergence,
        temperature=context.temperature,
        mask=None if mask is None else mask != 0,
        tokens=tokens,
        hard_weight=context.hard_weight,
        weights_hint=mask if mask is not None and mask.is_floating_point() else None,
        workspace_bytes=context.workspace_bytes,
        backend=context.backend,
    )
    return rows.gathered(losses).transpose(0, 1).contiguous()


def output_head(
    output_layer: Any,
    output_weight: Tensor | None = None,
    *,
    vocab: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Head:
    """Return Megatron's output layer as a Head, with this rank's rows where tensor parallelism splits it.

    Args:
        output_layer: a ColumnParallelLinear, `model.output_layer` on the last pipeline stage.
        output_weight: the weight that it shares with the embeddings, `model.shared_embedding_or_output_weight()`; None: it has
            its own.
        vocab: the tokens of the tokenizer; padded rows beyond it do not count.
        scale, softcap: of the logits, as in `topd.Head`.

    Returns:
        A Head of the live parameters, which gradients reach. With sequence parallelism its shard says so: the losses then take
        this rank's rows of the hidden states, and return those of the results.

    Raises:
        TypeError, ValueError: no ColumnParallelLinear, one with a forward of its own, no weight, or a vocab larger than it.
    """
    _check_layer(output_layer, softcap)
    positive_int("vocab", vocab)
    weight = output_layer.weight if output_weight is None else output_weight
    if weight is None:
        raise ValueError(
            "output_weight must be the embeddings' weight where the output layer shares it, got None; pass "
            "model.shared_embedding_or_output_weight()"
        )
    if vocab > output_layer.output_size:
        raise ValueError(
            f"vocab must be at most the {output_layer.output_size} rows of Megatron's output layer, got {vocab}; pass the "
            "number of tokens without padding"
        )
    bias = None if output_layer.skip_bias_add else output_layer.bias  # GPTModel drops a bias that the layer does not add
    group = output_layer.tp_group
    if group is None or group.size() == 1:
        return Head(weight, bias, scale=scale, softcap=softcap).first(vocab)
    start = min(group.rank() * output_layer.output_size_per_partition, vocab)
    shard = VocabShard(group, start, vocab, sequence_parallel=bool(output_layer.sequence_parallel))
    return Head(weight, bias, scale=scale, softcap=softcap, shard=shard)


def _shared_alike(teacher: Head, student: Head) -> Head:
    """Return the teacher's head, whose ranks share the sequence where those of the student's do."""
    if teacher.shard is None or student.shard is None:
        return teacher
    return replace(teacher, shard=replace(teacher.shard, sequence_parallel=student.shard.sequence_parallel))


def _factor_of(scale_logits: Any) -> float:
    """Return the number by which a function multiplies logits."""
    one, two = scale_logits(torch.tensor([1.0, 2.0])).tolist()
    if two != 2 * one:
        raise ValueError(
            f"scale_logits of the model must multiply logits by one number, got {one} of 1 and {two} of 2; topd knows a factor "
            "and a softcap alone"
        )
    return float(one)


def _check_layer(output_layer: Any, softcap: float | None) -> None:
    """Check for an output layer that computes what a Head does."""
    names = ("weight", "bias", "skip_bias_add", "tp_group", "sequence_parallel", "output_size", "output_size_per_partition")
    if lacking := [name for name in names if not hasattr(output_layer, name)]:
        raise TypeError(
            f"output_layer must be the ColumnParallelLinear of megatron-core {KNOWN}, got a {type(output_layer).__name__} of "
            f"megatron-core {_version()} without {', '.join(lacking)}; a LoRA on the output layer is not taken, leave it "
            "out of the adapter's layers"
        )
    forward = type(output_layer).forward
    if softcap is None and not forward.__module__.startswith("megatron.core."):
        raise ValueError(
            f"output_layer must have Megatron core's own forward, got {type(output_layer).__name__}, whose forward is of "
            f"{forward.__module__} and may change the logits; if it caps them, say so with softcap="
        )
    if getattr(output_layer, "gtp_remat_size", 1) > 1:
        raise ValueError(
            "output_layer must hold its rows whole, got one whose weight is split once more (gtp_remat); leave that off"
        )


def _check_config(config: Any) -> None:
    """Refuse settings under which Megatron computes the weight's gradient without autograd."""
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise ValueError(
            "config.defer_embedding_wgrad_compute must be False, got True: Megatron would compute the gradient of the output "
            "layer from activations that its own forward keeps; leave it off"
        )


def _check_forward() -> None:
    """Check that the installed GPTModel.forward takes an output processor."""
    try:
        from megatron.core.models.gpt.gpt_model import GPTModel
    except ImportError as error:
        raise ImportError(f"topd.integrations.megatron needs megatron-core {KNOWN}: {error}") from error
    parameters = inspect.signature(GPTModel.forward).parameters
    if lacking := [name for name in FORWARD_TAKES if name not in parameters]:
        raise ImportError(
            f"topd.integrations.megatron knows megatron-core {KNOWN}, whose GPTModel.forward takes "
            f"{' and '.join(FORWARD_TAKES)}; megatron-core {_version()} is installed, and its forward has no "
            f"{', '.join(lacking)}; install one of these versions"
        )


def _check_call(lacking: list[str]) -> None:
    """Check that Megatron gave what is read."""
    if lacking:
        raise TypeError(
            f"topd.integrations.megatron.output_processor knows the call of megatron-core {KNOWN}; megatron-core {_version()} "
            f"is installed, and its call has no {', '.join(lacking)}; install one of these versions"
        )


def _version() -> str:
    """Return the installed version of megatron-core."""
    try:
        import megatron.core
    except ImportError:
        return "of an unknown version"
    return str(getattr(megatron.core, "__version__", "of an unknown version"))
