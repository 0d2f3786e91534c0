"""From the tokens that count to the states that predict them: one column to the left."""

import torch
from torch import Tensor

from topd.checks.values import check_tensor


def next_token_mask(response_mask: Tensor | None = None, *, labels: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Return the mask of the states: True at column t where token t + 1 counts.

    A state hidden[:, t] predicts the token after its own, while masks and labels speak of the token in their own column::

        input_ids     = [[11, 12, 13, 14, 15]]
        response_mask = [[ 0,  0,  1,  1,  0]]   # 13 and 14 were sampled
        labels        = [[-100, -100, 13, 14, -100]]
        next_token_mask(response_mask)  or  next_token_mask(labels=labels)
                     -> [[False, True, True, False, False]]   # the states at 12 and at 13
        input_ids.roll(-1, 1)
                     -> [[12, 13, 14, 15, 11]]   # the tokens that the states predict; the last column is never True

    The mask goes with all of hidden, uncut, and with `input_ids.roll(-1, 1)` where tokens are wanted::

        hidden, head = topd.hidden_states(model, input_ids, attention_mask)
        topd.linear_divergence(hidden, head, ..., mask=topd.next_token_mask(response_mask), tokens=input_ids.roll(-1, 1))

    Labels are given by name: integers 0 and 1 may be a mask or labels.

    Args:
        response_mask: [B, T] bool, or integers 0 and 1, which is checked on the CPU; on a GPU, where a check would stall it, 1
            alone counts.
        labels: [B, T] int64 in place of it, as transformers takes them: not shifted, `ignore_index` at what does not count.
        ignore_index: of the labels.

    Returns:
        [B, T] bool. The last column is False, as it predicts what comes after the row. Whether the first token counts is in no
        column, since no state predicts it.

    Raises:
        TypeError, ValueError: both or neither, a wrong type, shape or dtype, or another number than 0 and 1 in response_mask.
    """
    if (response_mask is None) == (labels is None):
        came = "neither" if labels is None else "both"
        raise ValueError(f"give either response_mask or labels, got {came}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    mask = _response(response_mask) if labels is None else check_tensor("labels", labels, dtype=torch.int64)
    counts = mask if labels is None else mask != ignore_index
    if counts.dim() != 2:
        name = "response_mask" if labels is None else "labels"
        raise ValueError(f"{name} must be [B, T], a row for each sequence, got {list(counts.shape)}; unsqueeze a single one")
    return torch.nn.functional.pad(counts[:, 1:], (0, min(1, counts.shape[1])))


def _response(mask: object) -> Tensor:
    """Return a mask of bools or of the integers 0 and 1 as bool."""
    checked = check_tensor("response_mask", mask)
    if checked.dtype.is_floating_point or checked.dtype.is_complex:
        raise TypeError(f"response_mask must be bool or integers 0 and 1, got {checked.dtype}; compare it, mask > 0.5")
    if checked.dtype == torch.bool:
        return checked
    bad = (checked != 0) & (checked != 1)
    if checked.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        raise ValueError(f"response_mask must hold 0 and 1 alone, got {checked[bad][0].item()}; give labels as labels=...")
    return checked == 1
