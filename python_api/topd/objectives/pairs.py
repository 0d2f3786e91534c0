"""The teacher's side of a batch: it reads another prompt before the same response.

The j-th response token of a row is the j-th response token of the teacher's row, whatever padding, or gaps that tools left,
stand around it. Both sides' states before these tokens are selected, [N, H] in the order of the rows, and go through one
`linear_divergence`; what it returns goes back to the student's columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import LARGEST_INT, check_tensor
from topd.objectives.batch import PADDED_KEYS, Batch, Padded, check_padded
from topd.objectives.packed import PACKED_KEYS, Packed, check_packed, is_packed

SIDE = "teacher_"
PADDED_PAIR_KEYS = tuple(SIDE + key for key in PADDED_KEYS)
PACKED_PAIR_KEYS = tuple(SIDE + key for key in PACKED_KEYS)
PAIR_KEYS = tuple(dict.fromkeys(PADDED_PAIR_KEYS + PACKED_PAIR_KEYS))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which response token of the student's batch is which of the teacher's.

    Attributes:
        teacher: the teacher's batch.
        student_tokens, teacher_tokens: [N] int64, the places of the response tokens in either side's flattened input_ids.
        shape: of the student's input_ids.
    """

    teacher: Batch
    student_tokens: Tensor
    teacher_tokens: Tensor
    shape: torch.Size

    def student_states(self, hidden: Tensor) -> Tensor:
        """Return [N, H], the student's states that predict the response tokens, of all of its states."""
        return _before(hidden, self.student_tokens)

    def teacher_states(self, hidden: Tensor) -> Tensor:
        """Return [N, H], the teacher's states that predict the response tokens, of all of its states."""
        return _before(hidden, self.teacher_tokens)

    def selected(self, value: Tensor) -> Tensor:
        """Return [N], the entries at the response tokens of a tensor of the student's columns."""
        return value.reshape(-1).index_select(0, self.student_tokens)

    def by_token(self, value: Tensor) -> Tensor:
        """Turn [N], a number for each response token, into one of the student's columns, 0 or False elsewhere."""
        return value.new_zeros(self.shape.numel()).index_copy(0, self.student_tokens, value).reshape(self.shape)


def has_pairs(batch: object) -> bool:
    """Return whether a batch holds a key of the teacher's side."""
    return isinstance(batch, Mapping) and any(key in batch for key in PAIR_KEYS)


def check_pairs(batch: Mapping[str, Any], rollouts: Batch) -> Pairs | None:
    """Check the teacher's side of a batch and pair its response tokens with the student's; None: there is none.

    Raises:
        TypeError, ValueError: some of its keys alone; one side padded and the other packed; a wrong shape, dtype or device;
            another number of response tokens in a row, or other tokens. The last two are noticed on every device: selecting
            the tokens makes the host wait anyhow.
    """
    if not has_pairs(batch):
        return None
    teacher = _teacher_batch(batch, packed=is_packed(batch))
    device = (rollouts.input_ids.device, "input_ids")
    check_tensor("teacher_input_ids", teacher.input_ids, device=device)
    if teacher.rows != rollouts.rows:
        raise ValueError(
            f"teacher_input_ids must hold a row for each of the student's {rollouts.rows}, got {teacher.rows}; a row of either "
            "side has the same response"
        )
    own, others = _response_tokens(rollouts), _response_tokens(teacher)
    if own.numel() != others.numel():
        raise _unequal_counts(rollouts.row_of(own), teacher.row_of(others), rollouts.rows)
    rows, teacher_rows = rollouts.row_of(own), teacher.row_of(others)
    tokens, teacher_tokens = (side.input_ids.reshape(-1)[which] for side, which in ((rollouts, own), (teacher, others)))
    if not ((rows == teacher_rows) & (tokens == teacher_tokens)).all():
        if not torch.equal(rows, teacher_rows):
            raise _unequal_counts(rows, teacher_rows, rollouts.rows)
        raise _other_token(rows, tokens, teacher_tokens)
    return Pairs(teacher, own, others, rollouts.input_ids.shape)


def demand_pairs(batch: Mapping[str, Any], method: str) -> None:
    """Check that a batch has a teacher's side, without which a method would have nothing to teach."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    for key in PACKED_PAIR_KEYS if is_packed(batch) else PADDED_PAIR_KEYS:
        if key not in batch:
            raise ValueError(
                f"batch must hold {key}, since the teacher of topd.{method} reads another prompt, got no such key; it has "
                f"{sorted(batch)}; topd.pair makes such a batch of lists of ids"
            )


def _teacher_batch(batch: Mapping[str, Any], *, packed: bool) -> Padded | Packed:
    """Check the teacher's keys, all or none of which are there, and return its batch."""
    keys = PACKED_PAIR_KEYS if packed else PADDED_PAIR_KEYS
    kind, other = ("packed", "padded") if packed else ("padded", "packed")
    for key in PAIR_KEYS:
        if key in batch and key not in keys:
            raise ValueError(
                f"batch must hold no {key} where input_ids are {kind}, got a teacher's side that is {other}; pack both sides "
                "(topd.integrations.rollouts.pack_rollouts), or pad both"
            )
    for key in keys:
        if key not in batch:
            raise ValueError(
                f"batch must hold all of {', '.join(keys)}, or none where the teacher reads what the student reads, got no "
                f"{key}; it has {sorted(batch)}"
            )
    return check_packed(batch, SIDE) if packed else check_padded(batch, SIDE)


def _response_tokens(batch: Batch) -> Tensor:
    """Return [N] int64, the places of the response tokens in the flattened input_ids; never the first column, which no state
    predicts."""
    counted = batch.response.clone()
    counted[..., :1] = False
    return counted.reshape(-1).nonzero()[:, 0]


def _before(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return [N, H], the states one column to the left of the tokens."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, tokens - 1)


def _unequal_counts(rows: Tensor, teacher_rows: Tensor, count: int) -> ValueError:
    """Return the error for response tokens that lie in these rows."""
    own, others = (torch.bincount(each, minlength=count) for each in (rows, teacher_rows))
    row = int((own != others).nonzero()[0])
    return ValueError(
        "teacher_response_mask must mark as many tokens as response_mask in each row, got "
        f"{int(others[row])} and {int(own[row])} in row {row}"
    )


def _other_token(rows: Tensor, tokens: Tensor, teacher_tokens: Tensor) -> ValueError:
    """Return the error for tokens [N] that differ."""
    first = int((tokens != teacher_tokens).nonzero()[0])
    row = int(rows[first])
    place = first - int((rows < row).sum())
    return ValueError(
        f"teacher_input_ids must repeat the response, got {int(teacher_tokens[first])} for {int(tokens[first])} at response "
        f"token {place} of row {row}; tokenize it once"
    )


def pair(
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Make a batch of prompts of both sides and the responses that follow either, from lists of token ids.

    Prompts are padded on the left, responses on the right. With `pairs` from `topd.trd.batches`:

        batch = topd.pair(pairs.prompts, pairs.teacher_prompts, pairs.responses, tokenizer.pad_token_id)

    Args:
        prompts: [B] lists of ids, each with a token at least: what the student reads.
        teacher_prompts: [B] lists of ids, each with a token at least: what the teacher reads.
        responses: [B] lists of ids, which may be empty: tokenized once, they are the same behind either prompt.
        pad_token_id: >= 0, what stands where there is no token; it is not attended.

    Returns:
        input_ids [B, T] int64, attention_mask and response_mask [B, T] bool, and the same of the teacher's side,
        teacher_input_ids, teacher_attention_mask, teacher_response_mask [B, T'], on the CPU.

    Raises:
        TypeError, ValueError: not lists of ids, lists of unequal length, an empty prompt, a negative id.
    """
    padding = _padding(pad_token_id)
    columns = {"prompts": prompts, "teacher_prompts": teacher_prompts, "responses": responses}
    rows = {name: _rows(name, value) for name, value in columns.items()}
    for name in ("teacher_prompts", "responses"):
        if len(rows[name]) != len(rows["prompts"]):
            raise ValueError(
                f"{name} must hold a list for each of the {len(rows['prompts'])} prompts, got {len(rows[name])}; repeat a "
                "prompt for each of its responses"
            )
    for name in ("prompts", "teacher_prompts"):
        if [] in rows[name]:
            raise ValueError(
                f"{name} must hold a token at least in each list, got none in row {rows[name].index([])}; the first token of a "
                "response is predicted from the one before it"
            )
    own = _joined(rows["prompts"], rows["responses"], padding)
    others = _joined(rows["teacher_prompts"], rows["responses"], padding)
    return own | {SIDE + key: value for key, value in others.items()}


def _rows(name: str, value: object) -> list[list[int]]:
    """Check for a list of lists of ids, and return it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of lists of ids, got {type(value).__name__}; a tensor has .tolist()")
    return [_ids(f"{name}[{row}]", ids) for row, ids in enumerate(value)]


def _ids(name: str, ids: object) -> list[int]:
    """Check for a list of ids, and return it."""
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"{name} must be a list of ids, got {type(ids).__name__}; a tensor has .tolist()")
    listed = list(ids)
    for kind in set(map(type, listed)) - {int}:
        raise TypeError(f"{name} must hold ids, ints, got {kind.__name__}; tokenize it first")
    if listed and not 0 <= min(listed) <= max(listed) <= LARGEST_INT:
        raise ValueError(f"{name} must hold ids, ints >= 0, got {min(listed) if min(listed) < 0 else max(listed)}")
    return listed


def _padding(pad_token_id: object) -> int:
    """Check for the id of padding, and return it."""
    if type(pad_token_id) is not int:
        raise TypeError(f"pad_token_id must be an id, an int, got {type(pad_token_id).__name__}; any token serves, for one 0")
    if not 0 <= pad_token_id <= LARGEST_INT:
        raise ValueError(f"pad_token_id must be >= 0, got {pad_token_id}; any token serves, for one 0")
    return pad_token_id


def _joined(prompts: list[list[int]], responses: list[list[int]], padding: int) -> dict[str, Tensor]:
    """Return prompts padded on the left, and behind them responses padded on the right."""
    before, behind = (max(map(len, rows), default=0) for rows in (prompts, responses))
    ids = [
        [padding] * (before - len(prompt)) + prompt + response + [padding] * (behind - len(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    column = torch.arange(before + behind)
    starts = torch.tensor([before - len(prompt) for prompt in prompts], dtype=torch.int64).unsqueeze(1)
    ends = torch.tensor([before + len(response) for response in responses], dtype=torch.int64).unsqueeze(1)
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64).reshape(len(prompts), before + behind),
        "attention_mask": (column >= starts) & (column < ends),
        "response_mask": (column >= before) & (column < ends),
    }
