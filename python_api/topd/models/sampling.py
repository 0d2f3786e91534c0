"""Tokens drawn from a model's own distribution: from logits, or by the model's public `generate` after left-padded prefixes.

Whatever a model's generation_config holds (top-k, top-p, penalties, suppressed tokens) would make its tokens follow another
distribution than the one that a loss differentiates. A call here has a bare configuration; the model's own comes back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import end_tokens

# Tokens of a batch, prefixes and what follows them: what bounds the caches and states of one call.
BATCH_TOKENS = 32_768
BLOCK = 1024


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn.

    Attributes:
        horizon: the most tokens of one.
        temperature: >= 0; 0 is greedy.
        generator: of the model's device; None: torch's own.
        ends: the end-of-sequence tokens; may be empty.
        vocab: only ids below it are drawn.
    """

    horizon: int
    temperature: float
    generator: torch.Generator | None
    ends: list[int]
    vocab: int


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token for each row of logits [M, V]; temperature 0 takes the most likely one."""
    return most_likely(perturbed(logits, temperature, generator))


def most_likely(scores: Tensor) -> Tensor:
    """Return argmax of [M, V], the first of equals. By blocks on a CPU: there torch's argmax takes ten times as long as its
    amax."""
    vocab = scores.shape[-1]
    blocks = vocab // BLOCK
    if blocks < 2 or scores.device.type != "cpu":
        return scores.argmax(-1)
    across = scores.t()  # where scores lie column by column, [V, M] is what amax runs through in order
    if across.is_contiguous():
        tops = across[: blocks * BLOCK].unflatten(0, (blocks, BLOCK)).amax(1).t()
    else:
        tops = scores[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)).amax(-1)
    if vocab % BLOCK:
        tops = torch.cat([tops, scores[:, blocks * BLOCK :].amax(-1, keepdim=True)], dim=-1)
    start = tops.argmax(-1, keepdim=True) * BLOCK
    columns = (start + torch.arange(BLOCK)).clamp_max(vocab - 1)
    tokens: Tensor = start[:, 0] + scores.gather(-1, columns).argmax(-1)
    return tokens


def perturbed(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Return scores whose largest entry is a sample: logits / temperature plus Gumbel noise."""
    if temperature == 0:
        return logits
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return logits / temperature - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def prefixes(input_ids: Tensor, attended: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attended tokens before each position, left-padded with id 0: ids [m, P] int64 and their mask [m, P] bool."""
    row, column = positions.unbind(-1)
    before = attended[row] & (torch.arange(attended.shape[1], device=attended.device) < column.unsqueeze(-1))
    order = before.byte().argsort(dim=-1, stable=True)  # what is not attended goes to the left
    width = int(before.sum(-1).max())
    mask = before.gather(-1, order)[:, -width:]
    return input_ids[row].gather(-1, order)[:, -width:].masked_fill(~mask, 0), mask


def batches(positions: Tensor, horizon: int) -> list[Tensor]:
    """Return the indices of positions in batches of like length, the longest first."""
    order = positions[:, 1].argsort(descending=True, stable=True)
    parts, start = [], 0
    while start < order.numel():
        width = int(positions[order[start], 1]) + horizon
        stop = start + max(1, BATCH_TOKENS // width)
        parts.append(order[start:stop])
        start = stop
    return parts


def bare_settings(max_new_tokens: int, ends: list[int], padding: int, **sampling: Any) -> Any:
    """Return a GenerationConfig that changes no distribution.

    Args:
        ends: the end-of-sequence tokens; may be empty.
        padding: the id that stands after them.
        sampling: do_sample and what belongs to it.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        **sampling, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=padding, disable_compile=True
    )


def generated(
    model: Any, input_ids: Tensor, attended: Tensor, settings: Any, pick: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Return the tokens [m, n] with which `model.generate` continues prompts [m, P], under these settings alone.

    `generate` fills what a call leaves open from the model's generation_config: meanwhile that is the call's own.

    Args:
        settings: of `bare_settings`.
        pick: a logits processor, (tokens, logits) -> logits.
    """
    from transformers import LogitsProcessorList

    own, processors = model.generation_config, LogitsProcessorList([] if pick is None else [pick])
    model.generation_config = settings
    try:
        whole = model.generate(
            input_ids, attention_mask=attended.long(), generation_config=settings, logits_processor=processors
        )
    finally:
        model.generation_config = own
    return whole[:, input_ids.shape[1] :]  # type: ignore[no-any-return]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put the model in eval mode meanwhile; the modes of its modules come back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def left_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return prompts as ids [B, P] int64 and their mask [B, P] of 0 and 1, padded on the left; P a multiple of `multiple`."""
    width = max(map(len, rows))
    width = -(-width // multiple) * multiple if multiple else width
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def all_end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response: the model's and the tokenizer's."""
    ends, last = end_tokens(None, model), getattr(tokenizer, "eos_token_id", None)
    return ends if last is None or last in ends else [*ends, last]


def plain_text(tokenizer: Any, tokens: list[int]) -> str:
    """Return the text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def most_positions(model: Any) -> int | None:
    """Return how many positions a model has; None where its configuration does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else int(most)


def until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """Return [m, n] bool: True up to the first end-of-sequence token of each row, that one included."""
    stops = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device))
    return stops.long().cumsum(-1) - stops.long() == 0
