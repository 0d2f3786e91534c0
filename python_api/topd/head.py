"""The last layer of a language model, as the ops take it.

    logits(h) = softcap * tanh(scale * (h weightᵀ + bias + scaling (h aᵀ) bᵀ) / softcap)

without a softcap, no tanh. The adapter's product b·a, a full [V, H] matrix, is never formed.
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_tensor, flag, real
from topd.logits import shape_logits
from topd.models.fsdp2_state import INSIDE
from topd.models.head_from_model import head_from_model
from topd.models.verify_head import verify_head
from topd.ops.shared.collectives import exchanged_rows, outcomes
from topd.vocab_shard import Bounds, VocabShard, gap_in, is_dtensor, local_of, shard_of_dtensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank adapter on a head: logits += scaling * (h aᵀ) bᵀ.

    Args:
        a: [r, H] floating, r >= 1; its dtype may differ from the head's (PEFT keeps adapters in float32).
        b: [V, r], dtype of `a`.
        scaling: a number; LoRA's alpha / r.

    Raises:
        TypeError, ValueError: a wrong type, rank, dtype or device, named in the message.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        check_tensor("LowRank.a", self.a, dtype=FLOATING)
        check_tensor("LowRank.b", self.b, dtype=FLOATING, device=(self.a.device, "LowRank.a"))
        real("LowRank.scaling", self.scaling)
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"LowRank takes a [r, H] and b [V, r], got a {list(self.a.shape)} and b {list(self.b.shape)}")
        if self.a.shape[0] == 0:
            raise ValueError(f"LowRank.a must have a rank r >= 1, got a {list(self.a.shape)}; leave the adapter None for none")
        if self.a.dtype != self.b.dtype:
            raise ValueError(f"LowRank.a and LowRank.b must share a dtype, got {self.a.dtype} and {self.b.dtype}")


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's output layer; holds tensors, copies none.

    Args:
        weight: [V, H] float32, float64, bfloat16 or float16. A DTensor with one Shard(0) and Replicate on every other dimension
            of its mesh becomes this process's rows, and `shard` says which.
        bias: [V], dtype of `weight`, or None. An entry of -inf (with no softcap) gives the token probability 0.
        scale: multiplies weight, bias and adapter together (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: None, or c > 0 for c * tanh(x / c) (Gemma's final_logit_softcapping).
        adapter: a LowRank, or None.
        shard: None, or the VocabShard that says of which tokens weight, bias and adapter.b hold the rows; adapter.a is the same
            on every rank.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or placement, named in the message.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    adapter: LowRank | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, torch.nn.Module):
            raise TypeError(
                f"Head.weight must be a torch.Tensor, got the module {type(self.weight).__name__}; use "
                "topd.Head.from_model(model), which also reads bias, scale, softcap and adapter, or pass its weight"
            )
        self._localise()
        weight = check_tensor("Head.weight", self.weight, dtype=FLOATING)
        if self.shard is not None and not isinstance(self.shard, VocabShard):
            raise TypeError(f"Head.shard must be a topd.VocabShard or None, got {type(self.shard).__name__}")
        if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and self.shard is None):
            raise ValueError(
                f"Head.weight must be [V, H] with V, H >= 1, got {list(weight.shape)}; FSDP and ZeRO-3 gather a "
                f"sharded head in the model's forward: {INSIDE}; of a head that tensor parallelism shards, say with "
                "shard=topd.VocabShard(...) which rows it holds"
            )
        vocab, width = weight.shape
        device = (weight.device, "Head.weight")
        if self.bias is not None:
            shape = ((vocab,), "an entry for each row of Head.weight")
            check_tensor("Head.bias", self.bias, dtype=FLOATING, shape=shape, device=device)
            if self.bias.dtype != weight.dtype:
                raise ValueError(
                    f"Head.bias must have the dtype of Head.weight, {weight.dtype}, got {self.bias.dtype}; cast it"
                )
        real("Head.scale", self.scale)
        if self.softcap is not None:
            real("Head.softcap", self.softcap, low=0.0, open_low=True, hint="None means no softcap")
        if self.adapter is not None:
            if not isinstance(self.adapter, LowRank):
                raise TypeError(f"Head.adapter must be a topd.LowRank, got {type(self.adapter).__name__}")
            a, b = self.adapter.a, self.adapter.b
            check_tensor("Head.adapter.a", a, shape=((a.shape[0], width), "[r, H], H as in Head.weight"))
            check_tensor("Head.adapter.b", b, shape=((vocab, b.shape[1]), "[V, r], V as in Head.weight"))
            check_tensor("Head.adapter", a, device=device)

    def _localise(self) -> None:
        """Replace DTensors by this process's part of them, and note which part that is."""
        weight, adapter = self.weight, self.adapter
        parts = [] if not isinstance(adapter, LowRank) else [adapter.a, adapter.b]
        if not any(is_dtensor(value) for value in (weight, self.bias, *parts)):
            return
        local: dict[str, Any] = {"bias": local_of("Head.bias", self.bias, weight)}
        if isinstance(adapter, LowRank):
            a = local_of("Head.adapter.a", adapter.a, weight, split=False)
            local["adapter"] = LowRank(a, local_of("Head.adapter.b", adapter.b, weight), adapter.scaling)
        if is_dtensor(weight):
            if self.shard is not None:
                raise ValueError(
                    "Head.shard must be None where Head.weight is a DTensor, which says itself which rows are here"
                )
            local |= {"shard": shard_of_dtensor("Head.weight", weight), "weight": local_of("Head.weight", weight, weight)}
        for name, value in local.items():
            object.__setattr__(self, name, value)

    def detach(self) -> "Head":
        """Return the same head as a constant: it shares storage and requires no grad. For a model that teaches itself."""
        adapter = self.adapter
        if adapter is not None:
            adapter = LowRank(adapter.a.detach(), adapter.b.detach(), adapter.scaling)
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, adapter=adapter)

    def first(self, vocab: int) -> "Head":
        """Return the head of the first `vocab` tokens that it holds: views, no copies."""
        adapter = self.adapter
        if adapter is not None:
            adapter = LowRank(adapter.a, adapter.b[:vocab], adapter.scaling)
        bias = None if self.bias is None else self.bias[:vocab]
        return replace(self, weight=self.weight[:vocab], bias=bias, adapter=adapter)

    def bounds(self) -> Bounds:
        """Return which tokens of the vocabulary it holds, padding left out."""
        if self.shard is None:
            return Bounds(0, self.weight.shape[0])
        start = min(self.shard.start, self.shard.vocab)
        return Bounds(start, start + self.shard.held(self.weight.shape[0]))

    def resharded(self, *, like: "Head") -> "Head":
        """Return the same head with its rows where another one has the rows of these tokens: once, before training.

        For a teacher whose vocabulary is cut elsewhere than the student's (151,936 beside 152,064). Each rank receives the rows
        from `like`'s first token to that of the next rank, the last rank all that remain. Collective: every rank of the group
        calls it.

        Args:
            like: the head whose bounds are taken, over the same group; its shard's sequence_parallel as well.

        Returns:
            A Head of new tensors that require no grad.

        Raises:
            TypeError, ValueError: a head that is not sharded, another group, a head that requires grad, or ranks whose rows
                leave a gap; the last on all ranks.
        """
        if not isinstance(like, Head):
            raise TypeError(f"like must be a topd.Head, got {type(like).__name__}")
        if self.shard is None or like.shard is None or self.shard.group != like.shard.group:
            raise ValueError(
                "resharded takes two heads that are sharded over one group; make both with shard=topd.VocabShard(...)"
            )
        if grad := [name for name, value in self.tensors().items() if value.requires_grad]:
            raise ValueError(f"resharded moves constants, got a head whose {grad[0]} requires grad; call head.detach() first")
        group, vocab, mine = self.shard.group, self.shard.vocab, self.bounds()
        each = outcomes(group, [*mine, min(like.shard.start, vocab)], self.weight.device)
        held = [Bounds(start, stop) for start, stop, _ in each]
        starts = [start for *_, start in each]
        wanted = [Bounds(*pair) for pair in zip(starts, [*starts[1:], vocab], strict=True)]
        if gap := gap_in(held, vocab) or gap_in(wanted, vocab):
            raise ValueError(f"the ranks of a sharded head must hold its {vocab} tokens in their order, got a gap: {gap}")
        own = wanted[group.rank()]
        sent, received = [mine.shared(other) for other in wanted], [own.shared(other) for other in held]
        weight, bias, adapter = (self.weight, self.bias, self.adapter)

        def moved(rows: Tensor) -> Tensor:
            return exchanged_rows(group, rows[: mine.stop - mine.start], sent, received)

        if adapter is not None:
            adapter = LowRank(adapter.a, moved(adapter.b), adapter.scaling)
        shard = VocabShard(group, own.start, vocab, sequence_parallel=like.shard.sequence_parallel)
        return replace(self, weight=moved(weight), bias=None if bias is None else moved(bias), adapter=adapter, shard=shard)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it holds, by the name of their field."""
        tensors = {"weight": self.weight}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if self.adapter is not None:
            tensors |= {"adapter.a": self.adapter.a, "adapter.b": self.adapter.b}
        return tensors

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the full logits [..., V] of hidden [..., H], in eager torch: for reading and testing, not for training. Of a
        sharded head those of the rows that are here, padding included.

        float16 and bfloat16 are computed in float32, as the ops compute them.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        hidden = hidden.to(dtype)
        product = hidden @ self.weight.to(dtype).T
        if self.adapter is not None:
            low = hidden @ self.adapter.a.to(dtype).T
            product = product + self.adapter.scaling * (low @ self.adapter.b.to(dtype).T)
        if self.bias is not None:
            product = product + self.bias.to(dtype)
        return shape_logits(product, None, self.scale, self.softcap)

    @classmethod
    def from_model(cls, model: Any, *, verify: bool = True) -> "Head":
        """Return the head of a transformers causal language model, with its bias, scale, softcap and LoRA.

        It holds the live parameters, so gradients reach them. What it reads besides (adapter state, scale, softcap) is read
        once: build it anew after an adapter was switched, merged or disabled, or a head resized or replaced.

        Args:
            model: a decoder-only transformers model with a language model head, also inside PEFT, torch.compile or a
                data-parallel wrapper. A class of your own counts as the transformers class that it derives from; one that
                derives from none counts as plain unless its config has a scale or softcap set.
            verify: compare the logits that the model's own forward makes of a few random states with the head's, once for each
                model. No layer runs, and nothing of the model changes. Not looked at: a model that shows no base model, hooks,
                a forward put on the object in the place of its class's. False: do not compare.

        Returns:
            A Head in the dtype of the model's output embeddings. A LoRA on them becomes its adapter.

        Raises:
            TypeError: `model` is not a language model of transformers.
            ValueError: the logits are not those of a Head, or not from one plain floating weight on this rank (quantised,
                sharded, offloaded), or the model's own logits are others than the head's by more than rounding.
        """
        flag("verify", verify)
        parts = head_from_model(model)
        adapter = None if parts.adapter is None else LowRank(*parts.adapter)
        head = cls(parts.weight, parts.bias, scale=parts.scale, softcap=parts.softcap, adapter=adapter)
        if verify:
            verify_head(model, parts)
        return head
