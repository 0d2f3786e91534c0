"""Rollouts of a transformers causal language model, drawn from its own distribution.

They follow the distribution that the loss differentiates, unless a call cuts it, and whatever the model's generation_config
says: `topd.models.sampling`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import check_ids, check_rollouts, end_tokens
from topd.checks.values import check_tensor, positive_int, real
from topd.integrations.responses import behind, checked_masks, response_column
from topd.models.head_from_model import refuse_prompt_learning, unwrapped_model
from topd.models.in_step import in_step
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
    top_p: float = 1.0,
    top_k: int | None = None,
    samples_per_prompt: int = 1,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """Let the model continue prompts, and return the batch that an objective takes.

    Tokens are drawn from the model's full distribution at `temperature`, by its public `generate`, unless top_k or top_p say
    otherwise; there is no penalty. The model is in eval mode meanwhile; the modes of its modules come back. Draws come from
    torch's own generator.

    With top_p < 1 or a top_k the rollouts follow a cut distribution, no longer the one that the loss differentiates: the mean
    over them is not the divergence of whole trajectories. The TRD paper samples at temperature 0.6, top_p 0.95, top_k 20.

    Args:
        model: a causal language model of transformers, also inside PEFT or DDP, or sharded by FSDP2: nothing is trained here.
        input_ids: [B, P] int64, prompts padded on the left.
        attention_mask: [B, P] bool, or integers 0 and 1.
        max_new_tokens: > 0, the longest response.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]: draw from the fewest of the most likely tokens that hold this mass, among the top_k.
        top_k: > 0: draw from this many most likely tokens; None: all.
        samples_per_prompt: > 0, responses to each prompt. Row i * samples_per_prompt + j is the j-th response to prompt i; who
            has more tensors of a row each repeats them, `tensor.repeat_interleave(samples_per_prompt, dim=0)`.
        eos_token_id: an int or a list; None: those of the model's generation_config.
        pad_token_id: >= 0, what stands after a response; None: that of the generation_config, else 0.
        vocabulary: > 0, draw from the tokens below it alone: the size of a teacher's smaller vocabulary, which could not read
            others. None: the model's own.

    Returns:
        input_ids [B * samples_per_prompt, P + n] int64, attention_mask and response_mask of that shape, bool; a response ends
        with its first end-of-sequence token, which counts, or after n = at most max_new_tokens.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or range, or prompts that are not padded on the left.

    Source: arXiv 2606.08432, Table 9, for the settings named above.
    """
    inner = _generating(model)
    positive_int("max_new_tokens", max_new_tokens)
    sampling = check_sampling(temperature, top_p, top_k)
    samples = positive_int("samples_per_prompt", samples_per_prompt)
    ids, attended = _check_prompts(input_ids, attention_mask)
    check_ids("input_ids", ids, model=embedded_tokens(inner))
    if samples > 1:
        ids, attended = ids.repeat_interleave(samples, dim=0), attended.repeat_interleave(samples, dim=0)
    ends = end_tokens(eos_token_id, inner)
    padding = _padding(pad_token_id, inner)
    settings = bare_settings(max_new_tokens, ends, padding, **sampling)
    if vocabulary is not None:
        settings.suppress_tokens = list(range(positive_int("vocabulary", vocabulary), vocabulary_of(inner))) or None
    with eval_mode(inner), in_step(inner, lambda one: inner(input_ids=one, use_cache=False).logits):
        new = generated(inner, ids, attended, settings)
    kept = until_end(new, ends)
    return behind(ids, attended, new.masked_fill(~kept, padding), kept)


def with_teacher_prompts(
    rollouts: Mapping[str, Any], teacher_input_ids: Tensor, teacher_attention_mask: Tensor
) -> dict[str, Any]:
    """Put the responses of rollouts behind the teacher's prompts too: the batch of a teacher that reads another prompt.

    Args:
        rollouts: a padded batch as `sample_rollouts` returns it: input_ids, attention_mask and response_mask [B, T], the
            responses all beginning in one column, P. What tools wrote among a response's tokens goes with it.
        teacher_input_ids: [B, P'] int64, the teacher's prompts, padded on the left.
        teacher_attention_mask: [B, P'] bool, or integers 0 and 1.

    Returns:
        The rollouts' keys as they came, and teacher_input_ids int64, teacher_attention_mask and teacher_response_mask bool,
        [B, P' + T - P].

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or device; prompts that are not padded on the left.
    """
    ids, attended, response = checked_masks(rollouts)
    column = response_column(ids, attended, response)
    teacher_ids, teacher_attended = _check_prompts(teacher_input_ids, teacher_attention_mask, side="teacher_")
    if len(teacher_ids) != len(ids):
        raise ValueError(
            f"teacher_input_ids must have a row for each of input_ids, {len(ids)}, got {len(teacher_ids)}; repeat them where a "
            "prompt has several samples, teacher_input_ids.repeat_interleave(samples_per_prompt, dim=0)"
        )
    check_tensor("teacher_input_ids", teacher_ids, device=(ids.device, "input_ids"))
    completion = ids[:, column:], attended[:, column:], response[:, column:]
    return {**rollouts, **behind(teacher_ids, teacher_attended, *completion, side="teacher_")}


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


def check_sampling(temperature: float, top_p: float, top_k: int | None) -> dict[str, Any]:
    """Check how tokens are drawn, and return it in the words of a generation_config."""
    temperature = real("temperature", temperature, low=0.0, hint="0 is greedy")
    top_p = real("top_p", top_p, low=0.0, high=1.0, open_low=True)
    top_k = 0 if top_k is None else positive_int("top_k", top_k, hint="or None, for all tokens")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}


def _check_prompts(input_ids: object, attention_mask: object, side: str = "") -> tuple[Tensor, Tensor]:
    """Check prompts [B, P], padded on the left, and return them with their mask as bool."""
    ids, attended = check_rollouts(input_ids, attention_mask, side)
    if ids.numel() == 0:
        raise ValueError(f"{side}input_ids must hold a prompt in each row, got {list(ids.shape)}; start one with a token")
    whole = attended[:, -1] & (attended[:, 1:] >= attended[:, :-1]).all(-1)
    if not whole.all():
        raise ValueError(
            f"{side}attention_mask must be padded on the left (zeros, then ones up to the last column), got another pattern in "
            f"row {int((~whole).nonzero()[0])}; tokenize with padding_side='left'"
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
