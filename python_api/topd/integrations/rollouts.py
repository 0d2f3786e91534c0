"""Rollouts of a transformers causal language model, drawn from its own distribution.

They follow the distribution that the loss differentiates, whatever the model's generation_config says: `topd.models.sampling`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import check_ids, check_rollouts, end_tokens
from topd.checks.values import positive_int, real
from topd.models.head_from_model import refuse_prompt_learning, unwrapped_model
from topd.models.properties import embedded_tokens, vocabulary_of
from topd.models.sampling import bare_settings, eval_mode, generated, until_end
from topd.objectives.batch import Padded, check_padded
from topd.objectives.inputs import check_extras
from topd.objectives.pairs import check_pairs
from topd.objectives.topk_teacher import TOPK_KEYS, take_topk


@torch.no_grad()
def sample_rollouts(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """Let the model continue prompts, and return the batch that an objective takes.

    Tokens are drawn from the model's full distribution at `temperature`, by its public `generate`: no top-k, no top-p, no
    penalty. The model is in eval mode meanwhile; the modes of its modules come back. Draws come from torch's own generator.

    Args:
        model: a causal language model of transformers, also inside PEFT or DDP: nothing is trained here.
        input_ids: [B, P] int64, prompts padded on the left.
        attention_mask: [B, P] bool, or integers 0 and 1.
        max_new_tokens: > 0, the longest response.
        temperature: >= 0; 0 is greedy.
        eos_token_id: an int or a list; None: those of the model's generation_config.
        pad_token_id: >= 0, what stands after a response; None: that of the generation_config, else 0.
        vocabulary: > 0, draw from the tokens below it alone: the size of a teacher's smaller vocabulary, which could not read
            others. None: the model's own.

    Returns:
        input_ids [B, P + n] int64, attention_mask and response_mask [B, P + n] bool; a response ends with its first
        end-of-sequence token, which counts, or after n = at most max_new_tokens.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or range, or prompts that are not padded on the left.
    """
    inner = _generating(model)
    positive_int("max_new_tokens", max_new_tokens)
    temperature = real("temperature", temperature, low=0.0, hint="0 is greedy")
    ids, attended = _check_prompts(input_ids, attention_mask)
    check_ids("input_ids", ids, model=embedded_tokens(inner))
    ends = end_tokens(eos_token_id, inner)
    padding = _padding(pad_token_id, inner)
    full = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = bare_settings(max_new_tokens, ends, padding, **(full if temperature else {"do_sample": False}))
    if vocabulary is not None:
        settings.suppress_tokens = list(range(positive_int("vocabulary", vocabulary), vocabulary_of(inner))) or None
    with eval_mode(inner):
        new = generated(inner, ids, attended, settings)
    kept = until_end(new, ends)
    return {
        "input_ids": torch.cat([ids, new.masked_fill(~kept, padding)], dim=1),
        "attention_mask": torch.cat([attended, kept], dim=1),
        "response_mask": torch.cat([torch.zeros_like(attended), kept], dim=1),
    }


def pack_rollouts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave the padding of a batch of `sample_rollouts` out: the packed form, which `topd.OPD` takes too.

    Args:
        batch: input_ids [B, T] int64, attention_mask and response_mask [B, T] bool, or integers 0 and 1; it may hold a
            teacher's top-k, teacher_topk_logprobs and teacher_topk_ids [B, T, k]; a teacher's side, teacher_input_ids,
            teacher_attention_mask and teacher_response_mask [B, T']; token_weights [B, T]; verdict [B].

    Returns:
        input_ids [N] int64, response_mask [N] bool, cu_seqlens [B + 1] int32, with N the attended tokens; the top-k [N, k]; of
        the teacher's side teacher_input_ids and teacher_response_mask [M] and teacher_cu_seqlens [B + 1]; token_weights [N];
        verdict as it was.

    Raises:
        TypeError, ValueError: as `topd.OPD`.
    """
    topk, rest = take_topk(batch) if any(key in batch for key in TOPK_KEYS) else (None, batch)
    rollouts = check_padded(rest)
    pairs = check_pairs(rest, rollouts)
    check_extras(rest, rollouts)
    kept, packed = rollouts.attended, _packed(rollouts)
    if pairs is not None:
        assert isinstance(pairs.teacher, Padded)  # as its rollouts are
        packed |= {f"teacher_{key}": value for key, value in _packed(pairs.teacher).items()}
    if topk is not None:
        packed |= {"teacher_topk_logprobs": topk.logprobs[kept], "teacher_topk_ids": topk.ids[kept]}
    if "token_weights" in batch:
        packed["token_weights"] = batch["token_weights"][kept]
    if "verdict" in batch:
        packed["verdict"] = batch["verdict"]
    return packed


def _packed(rollouts: Padded) -> dict[str, Tensor]:
    """Return the attended tokens, which of them are of a response, and where each row begins and ends."""
    kept = rollouts.attended
    bounds = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    return {
        "input_ids": rollouts.input_ids[kept],
        "response_mask": rollouts.response[kept],
        "cu_seqlens": bounds.to(torch.int32),
    }


def _generating(model: Any) -> Any:
    """Return the model under its wrappers; refuse one that cannot generate."""
    refuse_prompt_learning(model)
    inner = unwrapped_model(model)
    if not hasattr(inner, "generate"):
        raise TypeError(f"model must have generate, got {type(inner).__name__}; pass the causal language model")
    return inner


def _check_prompts(input_ids: object, attention_mask: object) -> tuple[Tensor, Tensor]:
    """Check prompts [B, P], padded on the left, and return them with their mask as bool."""
    ids, attended = check_rollouts(input_ids, attention_mask)
    if ids.numel() == 0:
        raise ValueError(f"input_ids must hold a prompt in each row, got {list(ids.shape)}; start one with a token")
    whole = attended[:, -1] & (attended[:, 1:] >= attended[:, :-1]).all(-1)
    if not whole.all():
        raise ValueError(
            "attention_mask must be padded on the left (zeros, then ones up to the last column), got another pattern in row "
            f"{int((~whole).nonzero()[0])}; tokenize with padding_side='left'"
        )
    return ids, attended


def _padding(pad_token_id: object, model: Any) -> int:
    """Return what stands after a response: as given, or as the model's generation_config has it."""
    if pad_token_id is None:
        own = getattr(model.generation_config, "pad_token_id", None)
        return own if isinstance(own, int) else 0
    if pad_token_id != 0 or isinstance(pad_token_id, bool):
        return positive_int("pad_token_id", pad_token_id, hint="or 0")
    return 0
