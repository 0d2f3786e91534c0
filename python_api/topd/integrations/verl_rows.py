"""What travels between verl's FSDP engine and the model's forward: the teacher's rows in, each token's losses out."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.divergences import Divergence
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.losses.topk_divergence import topk_divergence

DIRECTIONS = {"forward_kl": "forward", "reverse_kl": "reverse"}


class RowLosses(NamedTuple):
    """The losses of all tokens [1, N] in nats, and the mass of the entries that are compared; NaN where it is not measured."""

    distillation_losses: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


class TeacherRows:
    """The teacher's side of a micro-batch's tokens, in the order of the student's packed tokens.

    No dataclass and no tuple: FSDP casts the tensors of those to the dtype of the parameters, and log-probabilities would lose
    digits.

    Args:
        divergence: what is computed.
        mask: [1, N] bool, the rows that predict a token of a response.
        hidden: [1, N, H_t], the teacher's hidden states where `head` is given.
        head: the teacher's Head, or None.
        ids, logprobs: [1, N, k], the teacher's most likely tokens where `head` is None.
        wants_logprobs: whether the log-probability of the sampled tokens and the entropy are read too.
    """

    def __init__(
        self,
        divergence: Divergence,
        mask: Tensor,
        *,
        hidden: Any = None,
        head: Head | None = None,
        ids: Any = None,
        logprobs: Any = None,
        wants_logprobs: bool = True,
    ) -> None:
        self.divergence, self.mask, self.wants_logprobs = divergence, mask, wants_logprobs
        self.hidden, self.head, self.ids, self.logprobs = hidden, head, ids, logprobs

    def losses(self, hidden: Tensor, student: Head, temperature: float) -> RowLosses:
        """Return the losses of the student's rows, hidden states [1, N, H]."""
        options: dict[str, Any]
        if self.head is not None:
            options = {"divergence": self.divergence, "temperature": temperature, "mask": self.mask}
            losses = linear_divergence(hidden, student, self.hidden, self.head, **options)
            return RowLosses(losses, torch.ones_like(losses), torch.ones_like(losses))
        options = {"direction": DIRECTIONS[self.divergence.name], "temperature": temperature, "mask": self.mask}
        losses = topk_divergence(hidden, student, self.ids.long(), self.logprobs, **options)
        return RowLosses(losses, torch.full_like(losses, torch.nan), self.logprobs.float().exp().sum(-1))


@cache
def output_types() -> tuple[Any, Any]:
    """Return the types of the forward's output and of its field `fused_linear_aux`.

    Outputs of transformers, so that FSDP finds the losses in them: it hooks the gradients of the tensors that it finds.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import ModelOutput

    @dataclass
    class DistillationRows(ModelOutput):  # type: ignore[misc]
        distillation_losses: Any = None
        student_mass: Any = None
        teacher_mass: Any = None

    @dataclass
    class CausalLMOutputWithLosses(CausalLMOutputWithPast):  # type: ignore[misc]
        log_probs: Any = None
        entropy: Any = None
        fused_linear_aux: Any = None

    return CausalLMOutputWithLosses, DistillationRows


def rows_of(micro_batch: Any, head: Head | None, divergence: Divergence, *, ulysses: bool) -> TeacherRows:
    """Return the teacher's rows of a micro-batch of verl.

    Args:
        micro_batch: with nested `input_ids`, and nested `teacher_hidden`, or `teacher_ids` and `teacher_logprobs`.
        head: the teacher's Head, or None for a top-k.
        divergence: what is computed.
        ulysses: whether the tokens are split over the ranks of verl's sequence-parallel group.
    """
    for option in ("use_fused_kernels", "use_remove_padding"):
        if not setting(micro_batch, option, option == "use_remove_padding"):
            raise ValueError(f"actor_rollout_ref.model.{option} must be True with a loss of topd, got False; set it to True")
    offsets = micro_batch["input_ids"].offsets()
    names = ("teacher_ids", "teacher_logprobs") if head is None else ("teacher_hidden",)
    values = []
    for name in names:
        value = micro_batch.get(name, None)
        if value is None or not value.is_nested or not torch.equal(value.offsets(), offsets):
            kind = "none" if value is None else "another tensor"
            raise ValueError(f"the batch must have {name}, a nested tensor with a row for each token of input_ids, got {kind}")
        values.append(_packed(value.values(), ulysses))
    mask = _packed(_predicts_response(micro_batch, offsets), ulysses)
    wants = not setting(micro_batch, "distillation_only", False) or setting(micro_batch, "calculate_entropy", False)
    if head is not None:
        return TeacherRows(divergence, mask, hidden=values[0], head=head, wants_logprobs=wants)
    ids, logprobs = values
    return TeacherRows(divergence, mask, ids=ids, logprobs=logprobs, wants_logprobs=wants)


def _predicts_response(micro_batch: Any, offsets: Tensor) -> Tensor:
    """Return which of the packed rows [N] predict a token of a response: from the prompt's last token on, all but the last."""
    prompts, rows = micro_batch["prompts"], torch.arange(int(offsets[-1]), device=offsets.device)
    width = prompts.shape[1]
    lengths = prompts.offsets().diff() if prompts.is_nested else micro_batch["attention_mask"][:, :width].sum(1)
    sequence = torch.bucketize(rows, offsets[1:], right=True)
    first, last = (offsets[:-1] + lengths - 1)[sequence], (offsets[1:] - 1)[sequence]
    predicts: Tensor = (rows >= first) & (rows < last)
    return predicts


def _packed(rows: Tensor, ulysses: bool) -> Tensor:
    """Return rows [N, ...] as [1, N, ...], this rank's part of them under Ulysses."""
    rows = rows.unsqueeze(0)
    if not ulysses:
        return rows
    from verl.utils.ulysses import slice_input_tensor

    return slice_input_tensor(rows, dim=1, padding=True)  # type: ignore[no-any-return]


def setting(micro_batch: Any, key: str, default: bool) -> bool:
    """Return a setting that travels with verl's micro-batch."""
    from verl.utils import tensordict_utils

    return bool(tensordict_utils.get_non_tensor_data(data=micro_batch, key=key, default=default))
