"""Windows that were made elsewhere (another engine, a file): checked against the batch whose step takes them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from topd.branching.continuations import from_rollout
from topd.branching.windows import Windows
from topd.checks.rollouts import check_positions
from topd.checks.tokens import check_lengths, refuse_positions, refuse_repeats
from topd.checks.values import check_tensor
from topd.objectives.batch import Padded
from topd.objectives.config import TOPDConfig
from topd.ops.transport.spec import MAX_WINDOW

SIDES = ("student", "teacher")


def check_given_windows(windows: object, rollouts: Padded, config: TOPDConfig, student_vocab: int, common: int) -> Windows:
    """Check windows of a batch, and return them; values are read on the CPU alone.

    Args:
        student_vocab: how many tokens the student has.
        common: how many both models have, of which the teacher's windows are.

    Raises:
        TypeError, ValueError: no Windows; a wrong shape, dtype, device or range; a position that is no response token, or that
            comes twice; with student_window "rollout" tokens of the student that are not the rollout's.
    """
    if not isinstance(windows, Windows):
        raise TypeError(f"windows must be a topd.Windows, got {type(windows).__name__}; put the engine's tokens into one")
    positions = check_positions(windows.positions, rollouts.attended, rollouts.response)
    if positions.device.type == "cpu":
        refuse_repeats(positions[:, 0] * rollouts.input_ids.shape[1] + positions[:, 1], positions, "leave the second one out")
    checked: dict[str, Any] = {"positions": positions}
    for side, vocab in zip(SIDES, (student_vocab, common), strict=True):
        tokens, lengths = _check_side(windows, side, positions)
        _check_ids(f"windows.{side}_tokens", tokens, lengths, vocab)
        checked |= {f"{side}_tokens": tokens, f"{side}_lengths": lengths}
    if config.student_window == "rollout":
        _check_rollout(checked["student_tokens"], checked["student_lengths"], positions, rollouts)
    return replace(windows, **checked)


def _check_side(windows: Windows, side: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Check one model's tokens [m, K] and lengths [m], and return them."""
    name, device, m = f"windows.{side}_tokens", (positions.device, "windows.positions"), positions.shape[0]
    tokens = check_tensor(name, getattr(windows, f"{side}_tokens"), dtype=torch.int64, device=device)
    if tokens.dim() != 2 or tokens.shape[0] != m or not 1 <= tokens.shape[1] <= MAX_WINDOW:
        raise ValueError(
            f"{name} must be [{m}, K], a row for each position and K from 1 to {MAX_WINDOW}, got {list(tokens.shape)}"
        )
    name, shape = f"windows.{side}_lengths", ((m,), "one for each position")
    return tokens, check_lengths(name, getattr(windows, f"{side}_lengths"), tokens.shape[1], shape=shape, device=device)


def _counted(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return [m, K] bool: which tokens stand before their window's end."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1)


def _check_ids(name: str, tokens: Tensor, lengths: Tensor, vocab: int) -> None:
    """Check that the tokens within the lengths are below the size of a vocabulary."""
    bad = _counted(tokens, lengths) & ((tokens < 0) | (tokens >= vocab))
    if tokens.device.type == "cpu" and bad.any():
        place = bad.nonzero()[0].tolist()
        whose = "the student has" if "student" in name else "both models have"
        raise ValueError(
            f"{name} must lie in [0, {vocab}), the tokens that {whose}, within the windows' lengths, got "
            f"{tokens[tuple(place)].item()} at {place}; let the engine sample from these alone"
        )


def _check_rollout(tokens: Tensor, lengths: Tensor, positions: Tensor, rollouts: Padded) -> None:
    """Check that the student's windows are the rollouts' own tokens, up to the ends of the responses at most."""
    if positions.device.type != "cpu":
        return
    own = from_rollout(rollouts.input_ids, rollouts.attended, positions, tokens.shape[1], rollouts.response)
    other = (lengths > own.lengths) | (_counted(tokens, lengths) & (tokens != own.tokens)).any(-1)
    rule = "have the rollout's own tokens in windows.student_tokens, up to the response's end, with student_window=\"rollout\""
    refuse_positions(other, positions, rule, 'copy them from input_ids, or take student_window="regenerate"')
