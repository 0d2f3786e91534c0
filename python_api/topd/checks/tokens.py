"""Checks of token ids, and of what says where tokens stand: lengths, offsets, positions.

Numbers are read on the CPU alone: on a GPU that would stall the stream.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from topd.checks.values import check_tensor

# For those who unpack topk_logprobs in the order that it had before 0.2.
TOPK_ORDER = "topd.topk_logprobs returns (logprobs, ids), as torch.topk does, no longer (ids, logprobs)"


def check_chosen_ids(name: str, ids: object, hidden: Tensor) -> Tensor:
    """Check the ids [..., M] of the tokens that are looked at in each row of hidden [..., H]."""
    if isinstance(ids, Tensor) and ids.is_floating_point():
        raise TypeError(f"{name} must be torch.int64, got {ids.dtype}; cast ids with .to(torch.int64); {TOPK_ORDER}")
    checked = check_tensor(name, ids, dtype=torch.int64, device=(hidden.device, "hidden"))
    if checked.dim() != hidden.dim():
        raise ValueError(
            f"{name} must be [..., M] with the leading shape of hidden, {list(hidden.shape[:-1])}, got {list(checked.shape)}"
        )
    shape = (*hidden.shape[:-1], checked.shape[-1])
    return check_tensor(name, checked, shape=(shape, "the leading shape of hidden, then M"))


def check_lengths(
    name: str, lengths: object, width: int, *, shape: tuple[Sequence[int], str], device: tuple[torch.device, str]
) -> Tensor:
    """Check the lengths of windows, int64 and between 1 and their width; shape and device as in `check_tensor`."""
    checked = check_tensor(name, lengths, dtype=torch.int64, shape=shape, device=device)
    if checked.device.type == "cpu" and (bad := (checked < 1) | (checked > width)).any():
        raise ValueError(f"{name} must lie in [1, {width}], the windows' width, got {checked[bad][0].item()}")
    return checked


def check_offsets(cu_seqlens: object, packed: Tensor, name: str, side: str = "") -> Tensor:
    """Check where the sequences of `packed` [N] begin and end, and return it as int64 [B + 1]. Its name begins with `side`."""
    bounds = check_tensor(f"{side}cu_seqlens", cu_seqlens, dtype=torch.int32, device=(packed.device, name)).long()
    total = packed.numel()
    good = bounds.dim() == 1 and bounds.numel() >= (2 if total else 1)
    if good and bounds.device.type == "cpu":
        good = bool(bounds[0] == 0 and bounds[-1] == total and (bounds.diff() >= 0).all())
    if not good:
        rule = f"[B + 1], start at 0, never decrease and end at N = {total}, the length of {name}"
        raise ValueError(f"{side}cu_seqlens must be {rule}, got {bounds.tolist()}; it is 0, then the cumsum of the lengths")
    return bounds


def check_position_form(positions: object, like: Tensor, name: str) -> Tensor:
    """Check that positions are int64 [m, 2] (row, column) where `like` is [B, T], int64 [m] where it is packed, [N]."""
    checked = check_tensor("positions", positions, dtype=torch.int64, device=(like.device, name))
    padded = like.dim() == 2
    if checked.shape[1:] != ((2,) if padded else ()) or not checked.dim():
        rule = "[m, 2] (row, column)" if padded else "[m] with cu_seqlens"
        raise ValueError(f"positions must be {rule}, as select_candidates returns them, got {list(checked.shape)}")
    return checked


def refuse_positions(bad: Tensor, positions: Tensor, rule: str, remedy: str) -> None:
    """Raise where a position is bad [m], and show the first."""
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"positions must {rule}, got {positions[first].tolist()} (index {first}); {remedy}")


def refuse_repeats(entries: Tensor, positions: Tensor, remedy: str) -> None:
    """Raise where positions are not distinct, and show the first that repeats an earlier one.

    Args:
        entries: [m] int64, a number that says where each position is.
    """
    ordered, order = entries.sort(stable=True)
    repeats = order[1:][ordered[1:] == ordered[:-1]]
    repeated = torch.zeros_like(entries, dtype=torch.bool).index_fill(0, repeats, True)
    refuse_positions(repeated, positions, "be distinct", remedy)
