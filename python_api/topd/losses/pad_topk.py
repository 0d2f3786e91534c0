"""A server's answers, ragged lists of token ids and log-probabilities, as the tensors of a top-k teacher."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import check_tensor, positive_int
from topd.losses.topk_logprobs import TopK

FORMS = "a mapping of ids to log-probabilities, a list of pairs (id, logprob), or None where nothing is known"


def pad_topk(answers: Sequence[Sequence[Any]], mask: Tensor | None = None, *, k: int | None = None) -> TopK:
    """Pad what a server said of each token to the tensors that `topk_divergence` and `OPD(student, None)` take.

    Args:
        answers: for each sequence a list with an entry for each of its tokens: a mapping of ids to log-probabilities, as vLLM's
            prompt_logprobs has it (a value may be a number, an object with `.logprob` or a mapping with "logprob"; an id may be
            its decimal string, as JSON has it); a list of pairs (id, logprob); or None or an empty one where nothing is known.
        mask: [B, T] bool, or integers 0 and 1: where the tokens of each sequence stand, in order. That is attention_mask where
            the server spoke of prompt and response, response_mask where of the response alone. None: from column 0 on, T the
            longest.
        k: entries of a token in the result; None: as many as the longest has.

    Returns:
        (logprobs, ids), with these names; log-probabilities [B, T, k] float32, nats, -inf for padding, and ids [B, T, k] int64,
        0 for padding; on the device of `mask`. The order within a token is the server's.

    Raises:
        TypeError, ValueError: an answer of another form, a mask that marks another number of tokens, more than k entries.
    """
    rows = [_tokens_of(b, sequence) for b, sequence in enumerate(_sequence("answers", answers))]
    longest = max((len(entries) for row in rows for entries in row), default=0)
    width = max(longest, 1) if k is None else positive_int("k", k)
    if longest > width:
        raise ValueError(
            f"k must be at least the {longest} entries that a token has, got {k}; vLLM may return one more than asked"
        )
    place = _places(rows, mask)
    logprobs = torch.full((*place.shape, width), -torch.inf)
    ids = torch.zeros(logprobs.shape, dtype=torch.int64)
    known = torch.tensor([m < len(entries) for row in rows for entries in row for m in range(width)], dtype=torch.bool)
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[place] = known.reshape(-1, width)
    pairs = [pair for row in rows for entries in row for pair in entries]
    ids[chosen] = torch.tensor([token for token, _ in pairs], dtype=torch.int64)
    logprobs[chosen] = torch.tensor([logprob for _, logprob in pairs])
    device = place.device if mask is None else mask.device
    return TopK(logprobs.to(device), ids.to(device))


def _sequence(name: str, value: object) -> Sequence[Any]:
    """Check for a list."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name} must be a list, got {type(value).__name__}; give a list of sequences, each a list of its tokens"
        )
    return value


def _tokens_of(b: int, sequence: object) -> list[list[tuple[int, float]]]:
    """Return the entries of each token of a sequence."""
    return [_entries(f"answers[{b}][{t}]", answer) for t, answer in enumerate(_sequence(f"answers[{b}]", sequence))]


def _entries(name: str, answer: Any) -> list[tuple[int, float]]:
    """Return the (id, log-probability) pairs of one token."""
    if answer is None:
        return []
    if isinstance(answer, Mapping):
        pairs: Iterable[Any] = answer.items()
    elif isinstance(answer, Sequence) and not isinstance(answer, str):
        pairs = answer
    else:
        raise TypeError(f"{name} must be {FORMS}, got {type(answer).__name__}")
    return [_pair(name, pair) for pair in pairs]


def _pair(name: str, pair: Any) -> tuple[int, float]:
    """Return one entry of a token as a pair of numbers."""
    if isinstance(pair, str | Mapping) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} must be {FORMS}, got the entry {pair!r}")
    token, value = pair
    if isinstance(token, str) and token.isdecimal():
        token = int(token)
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise TypeError(f"{name} must have token ids, ints or decimal strings, got {token!r}; ask the server for ids")
    if token < 0:
        raise ValueError(f"{name} must have token ids >= 0, got {token}")
    logprob = value["logprob"] if isinstance(value, Mapping) and "logprob" in value else getattr(value, "logprob", value)
    if isinstance(logprob, bool) or not isinstance(logprob, Real):
        raise TypeError(f"{name} must have a number as the log-probability of {token}, got {value!r}")
    if not float(logprob) <= 1e-3:  # NaN too
        raise ValueError(f"{name} must have log-probabilities, at most 0, got {logprob} for {token}")
    return int(token), float(logprob)


def _places(rows: list[list[Any]], mask: Tensor | None) -> Tensor:
    """Return where the tokens stand, [B, T] bool on the CPU."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    if mask is None:
        return torch.arange(max(map(len, rows), default=0)) < lengths.unsqueeze(-1)
    place = check_tensor("mask", mask).cpu()
    if place.is_floating_point() or place.dim() != 2 or len(place) != len(rows):
        raise ValueError(
            f"mask must be bool or integers 0 and 1, [{len(rows)}, T], a row for each sequence, got {place.dtype} "
            f"{list(place.shape)}"
        )
    place = place != 0
    if (bad := place.sum(-1) != lengths).any():
        b = int(bad.nonzero()[0])
        raise ValueError(
            f"mask must mark as many tokens as answers has, {len(rows[b])} of sequence {b}, got {int(place[b].sum())}; take "
            "attention_mask for answers about prompt and response, response_mask for the response alone"
        )
    return place
