"""The last layer of a language model, as the ops take it.

    logits(h) = softcap * tanh(scale * (h weightᵀ + bias + scaling (h aᵀ) bᵀ) / softcap)

without a softcap, no tanh. The adapter's product b·a, a full [V, H] matrix, is never formed.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_tensor, flag, real
from topd.logits import shape_logits
from topd.models.head_from_model import head_from_model
from topd.models.verify_head import verify_head


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
        weight: [V, H] float32, float64, bfloat16 or float16.
        bias: [V], dtype of `weight`, or None. An entry of -inf (with no softcap) gives the token probability 0.
        scale: multiplies weight, bias and adapter together (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: None, or c > 0 for c * tanh(x / c) (Gemma's final_logit_softcapping).
        adapter: a LowRank, or None.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or range, named in the message.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    adapter: LowRank | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, torch.nn.Module):
            raise TypeError(
                f"Head.weight must be a torch.Tensor, got the module {type(self.weight).__name__}; use "
                "topd.Head.from_model(model), which also reads bias, scale, softcap and adapter, or pass its weight"
            )
        weight = check_tensor("Head.weight", self.weight, dtype=FLOATING)
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(
                f"Head.weight must be [V, H] with V, H >= 1, got {list(weight.shape)}; gather a sharded head before the call"
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

    def detach(self) -> "Head":
        """Return the same head as a constant: it shares storage and requires no grad. For a model that teaches itself."""
        adapter = self.adapter
        if adapter is not None:
            adapter = LowRank(adapter.a.detach(), adapter.b.detach(), adapter.scaling)
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, scale=self.scale, softcap=self.softcap, adapter=adapter)

    def first(self, vocab: int) -> "Head":
        """Return the head of the first `vocab` tokens: views, no copies."""
        adapter = self.adapter
        if adapter is not None:
            adapter = LowRank(adapter.a, adapter.b[:vocab], adapter.scaling)
        bias = None if self.bias is None else self.bias[:vocab]
        return Head(self.weight[:vocab], bias, scale=self.scale, softcap=self.softcap, adapter=adapter)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it holds, by the name of their field."""
        tensors = {"weight": self.weight}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if self.adapter is not None:
            tensors |= {"adapter.a": self.adapter.a, "adapter.b": self.adapter.b}
        return tensors

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the full logits [..., V] of hidden [..., H], in eager torch: for reading and testing, not for training.

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
