"""Windows of models that cannot branch: batches of left-padded prefixes through `model.generate`."""

from typing import Any

import torch
from torch import Tensor

from topd.branching.decode import perturbed
from topd.models.decoder import Decoder

# Tokens of a batch, prefixes and windows: what bounds the caches and states of one call.
BATCH_TOKENS = 32_768


def prefixes(input_ids: Tensor, attended: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The attended tokens before each position, left-padded with id 0: ids [m, P] int64 and their mask [m, P] bool."""
    row, column = positions.unbind(-1)
    before = attended[row] & (torch.arange(attended.shape[1], device=attended.device) < column.unsqueeze(-1))
    order = before.byte().argsort(dim=-1, stable=True)  # what is not attended goes to the left
    width = int(before.sum(-1).max())
    mask = before.gather(-1, order)[:, -width:]
    return input_ids[row].gather(-1, order)[:, -width:].masked_fill(~mask, 0), mask


def batches(positions: Tensor, horizon: int) -> list[Tensor]:
    """The indices of positions in batches of like length, the longest first."""
    order = positions[:, 1].argsort(descending=True, stable=True)
    found, start = [], 0
    while start < order.numel():
        width = int(positions[order[start], 1]) + horizon
        stop = start + max(1, BATCH_TOKENS // width)
        found.append(order[start:stop])
        start = stop
    return found


@torch.no_grad()
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    attended: Tensor,
    positions: Tensor,
    *,
    horizon: int,
    temperature: float,
    generator: torch.Generator | None,
    ends: list[int],
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """A window from each position; arguments and results as of `topd.branching.decode.decode`."""
    from transformers import GenerationConfig, LogitsProcessorList

    def pick(_: Tensor, scores: Tensor) -> Tensor:
        kept = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= vocab, -torch.inf)
        return perturbed(kept.to(torch.promote_types(kept.dtype, torch.float32)), temperature, generator)

    nowhere = decoder.head.weight.shape[0]  # an id that is never drawn: None would mean the model's own
    neutral: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "return_dict_in_generate": False,
    }
    settings = GenerationConfig(
        **neutral,
        max_new_tokens=horizon,
        eos_token_id=ends or nowhere,
        pad_token_id=0,
        use_cache=True,
        cache_implementation=None,
    )
    tokens = positions.new_zeros(positions.shape[0], horizon)
    for chosen in batches(positions, horizon):
        ids, mask = prefixes(input_ids, attended, positions[chosen])
        whole = decoder.model.generate(
            ids, attention_mask=mask.long(), generation_config=settings, logits_processor=LogitsProcessorList([pick])
        )
        new = whole[:, ids.shape[1] :]
        tokens[chosen, : new.shape[1]] = new
    return ended(tokens, ends)


def ended(tokens: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens [m, K] with 0 past the first end-of-sequence token, and lengths [m], that token counted."""
    stops = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device))
    past = stops.long().cumsum(-1) - stops.long() > 0
    return tokens.masked_fill(past, 0), (~past).sum(-1)
