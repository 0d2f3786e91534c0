"""A causal language model of transformers as topd uses it: hidden states, logits, and whether it can branch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from topd.head import Head
from topd.logits import shape_logits
from topd.losses.operands import vocabulary_of
from topd.models.branchable import forward_parameters, layer_kinds, obstacle_of
from topd.models.data_parallel import is_sharded_in_place
from topd.models.head_from_model import base_of, refuse_prompt_learning, unwrapped_model
from topd.models.in_step import InStep, in_step
from topd.models.split_logits import whole_product, widths_of

FEW = range(8, 65)  # rows of logits that a CPU computes faster from the head's side


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model, its base model and its head.

    Attributes:
        model: the causal language model of transformers under its wrappers.
        base: the part of it that ends in last_hidden_state.
        output: its output layer, as it was when the decoder was made; of a model that is split over processes its rows that are
            here.
        sliding: how many tokens each kind of attention layer sees back, by the kind's name; None: all of them.
        obstacle: why it cannot branch; empty where it can.
        unpackable: why it cannot read packed sequences; empty where it can.
    """

    model: Any
    base: Any
    output: Head
    sliding: dict[str, int | None]
    obstacle: str
    unpackable: str

    @property
    def head(self) -> Head:
        """The output layer with live parameters, read anew: for a loss that is computed behind the states.

        Autograd goes back through what was computed last. FSDP2 exchanges a unit's gradients when it comes to the unit's first
        module: where the last norm shares one with the head, what a Head makes of the weight (this rank's part, its first rows)
        must come behind the norm, or its gradient would come too late.
        """
        return Head.from_model(self.model, verify=False)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Return last_hidden_state [B, T, H] by the base model's public forward, which is given no argument that it lacks."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
        given = {name: value for name, value in given.items() if value is not None and name in self.parameters}
        output = self.base(input_ids=input_ids, use_cache=cache is not None, **given, **inputs)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def in_step(self) -> AbstractContextManager[InStep]:
        """Return the block in which processes that shard this model make equally many forwards."""
        return in_step(self.base, lambda ids: self.states(ids, None, None))

    @property
    def parameters(self) -> set[str]:
        """The names that the base model's forward takes."""
        return forward_parameters(self.base)

    def packed_states(self, input_ids: Tensor, position_ids: Tensor, bounds: Tensor) -> Tensor:
        """Return last_hidden_state [N, H] of sequences one after the other, each of which sees itself alone.

        Without an attention mask transformers cuts where position_ids [N] do not go on; flash attention is told where. Where
        there is no token the model reads one, whose state is dropped, as in `topd.branching.prefill`.
        """
        if not input_ids.numel():
            one = input_ids.new_zeros(1)
            return self.packed_states(one, one, input_ids.new_tensor([0, 1]))[:0]
        varlen: dict[str, Any] = {}
        if "flash" in str(self.model.config._attn_implementation):
            offsets, longest = bounds.to(torch.int32), int(bounds.diff().max())
            varlen = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
        output = self.base(
            input_ids=input_ids.unsqueeze(0),
            attention_mask=None,
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            **varlen,
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, vocab: int) -> Tensor:
        """Return float32 (float64) logits [..., vocab] of a few states, by the model's own output layer; where processes share
        its rows all of them call it, with the same states."""
        layer = self.model.get_output_embeddings()
        if self.output.shard is None:
            product = _output(layer, hidden)[..., : self.output.weight.shape[0]]
        else:  # in the memory format of a whole head's, in whose order noise is drawn
            product = whole_product(self.output, self._widths, hidden, by_columns=_is_by_columns(layer, hidden))
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        return shape_logits(product, None, self.output.scale, self.output.softcap)[..., :vocab]

    @property
    def vocab(self) -> int:
        """How many tokens its logits are of."""
        return vocabulary_of(self.output)

    @cached_property
    def _widths(self) -> list[int]:
        """How many tokens each process holds that shares the head."""
        return widths_of(self.output)

    @property
    def forbids_cache(self) -> bool:
        """Whether gradient checkpointing is at work, under which the layers drop every cache."""
        return bool(next(self._checkpointed(), None))

    @property
    def keeps_cache(self) -> bool:
        """Whether windows can grow from the cache of a pass over the rollouts, gradients included."""
        return not (self.obstacle or self.forbids_cache)

    @contextmanager
    def cache_allowed(self) -> Iterator[None]:
        """Let checkpointed layers keep their cache meanwhile: their own training flag, which says to drop it, is down. Modules
        in them (dropout) stay as they are, and the flags come back."""
        paused = list(self._checkpointed())
        for module in paused:
            module.training = False
        try:
            yield
        finally:
            for module in paused:
                module.training = True

    def _checkpointed(self) -> Iterator[Any]:
        """Yield the layers that recompute their activations in the backward pass."""
        return (part for part in self.base.modules() if part.training and getattr(part, "gradient_checkpointing", False))


def _is_by_columns(layer: Any, hidden: Tensor) -> bool:
    """Tell whether few rows of a layer's output lie column by column in memory, hooks left aside."""
    plain = type(layer) is torch.nn.Linear and layer.bias is None
    return plain and hidden.dim() == 2 and hidden.device.type == "cpu" and hidden.shape[0] in FEW


def _output(layer: Any, hidden: Tensor) -> Tensor:
    """Return the layer's output [..., V]. A CPU multiplies few rows faster as W hᵀ, 32 of them by a third: the result is then a
    transpose, column by column in memory."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if not hooked and _is_by_columns(layer, hidden):
        return torch.mm(layer.weight, hidden.t()).t()
    # The unit that FSDP2 makes of a head is whole here; its hooks would take the call for one of the model's own forward.
    product: Tensor = layer.forward(hidden) if is_sharded_in_place(layer) else layer(hidden)
    return product


def decoder_of(model: Any) -> Decoder:
    """Return the Decoder of a causal language model of transformers, also inside its wrappers.

    Raises:
        TypeError, ValueError: as `topd.Head.from_model`; a PEFT prompt, which lives outside the base model.
    """
    refuse_prompt_learning(model)
    head = Head.from_model(model)
    inner = unwrapped_model(model)
    base = base_of(inner)
    if base is None:
        name = type(inner).__name__
        raise ValueError(f"model must have a base model that ends in last_hidden_state, got none in {name}")
    sliding, strange = layer_kinds(inner.config)
    obstacle = strange or obstacle_of(inner, base)
    attention = str(getattr(inner.config, "_attn_implementation", None))
    dense = attention in ("sdpa", "eager")
    masked = "" if dense else f"attention {attention!r} takes no 4-D mask"
    apart = "" if dense or "flash" in attention else f"attention {attention!r} is not known to keep packed sequences apart"
    return Decoder(inner, base, head, sliding, obstacle=obstacle or masked, unpackable=obstacle or apart)


def position_ids_of(attended: Tensor) -> Tensor:
    """Return position_ids [B, T]: how many attended tokens stand before each, 0 on padding at the left."""
    return (attended.long().cumsum(-1) - 1).clamp_min(0)
