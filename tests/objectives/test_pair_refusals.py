"""What a batch with a teacher's side must hold: every wrong one is refused by name, and so are wrong weights and verdicts."""

import pytest
import torch
from pair_cases import batch_of, models
from topk_teacher_cases import with_topk

import topd
from topd.integrations.rollouts import pack_rollouts

SIDE = ("teacher_input_ids", "teacher_attention_mask", "teacher_response_mask")


def without(*keys):
    return lambda batch: {key: value for key, value in batch.items() if key not in keys}


def changed(key, change):
    """Return the change of a batch by which one tensor is another; it may also work in place on a copy."""

    def apply(batch):
        value = batch[key].clone()
        result = change(value)
        return batch | {key: value if result is None else result}

    return apply


def one_less(row):
    """Take the first response token of a row out of a mask."""

    def change(mask):
        mask[row, mask[row].nonzero()[0]] = 0

    return change


def other_token(ids):
    """The last one of row 2, whose prompt of 11 tokens is the longest."""
    ids[2, 14] = (ids[2, 14] + 1) % 61


def moved_packed(mask):
    """Row 0, tokens 0 to 14, has one response token less, row 3, from token 32 on, one more: the same in all."""
    mask[8], mask[35] = False, True


def moved(mask):
    """Row 3 has one response token less, row 2 one more: the same in all."""
    mask[3, mask[3].nonzero()[0]] = 0
    mask[2, mask[2].nonzero()[0] - 1] = 1


PADDED = {
    "some keys": (
        without(SIDE[1]),
        ValueError,
        "batch must hold all of teacher_input_ids, .* got no teacher_attention_mask; it has",
    ),
    "one key": (without(*SIDE[1:]), ValueError, "batch must hold all of .* or none where .*, got no teacher_attention_mask"),
    "offsets": (
        lambda batch: batch | {"teacher_cu_seqlens": torch.tensor([0, 1], dtype=torch.int32)},
        ValueError,
        "batch must hold no teacher_cu_seqlens where input_ids are padded, got a teacher's side that is packed; pack both",
    ),
    "packed teacher": (
        lambda batch: {**without(*SIDE)(batch), **{k: v for k, v in pack_rollouts(batch).items() if k.startswith("teacher_")}},
        ValueError,
        "batch must hold no teacher_cu_seqlens where input_ids are padded",
    ),
    "fewer tokens": (
        changed(SIDE[2], one_less(2)),
        ValueError,
        "teacher_response_mask must mark as many tokens as response_mask in each row, got 3 and 4 in row 2",
    ),
    "fewer tokens of the student": (
        changed("response_mask", one_less(0)),
        ValueError,
        "teacher_response_mask must mark as many tokens as response_mask in each row, got 7 and 6 in row 0",
    ),
    "as many in all": (
        changed(SIDE[2], moved),
        ValueError,
        "teacher_response_mask must mark as many tokens as response_mask in each row, got 5 and 4 in row 2",
    ),
    "another token": (
        changed(SIDE[0], other_token),
        ValueError,
        r"teacher_input_ids must repeat the response, got \d+ for \d+ at response token 3 of row 2; tokenize it once",
    ),
    "fewer rows": (
        lambda batch: batch | {key: batch[key][:3] for key in SIDE},
        ValueError,
        "teacher_input_ids must hold a row for each of the student's 4, got 3",
    ),
    "another shape": (
        changed(SIDE[2], lambda mask: mask[:, 1:]),
        ValueError,
        "teacher_response_mask must have shape .*teacher_inp",
    ),
    "no mask": (changed(SIDE[1], torch.Tensor.double), TypeError, "teacher_attention_mask must be bool or integers 0 and 1"),
    "no ids": (changed(SIDE[0], torch.Tensor.int), TypeError, "teacher_input_ids must be torch.int64, got torch.int32"),
    "one row alone": (changed(SIDE[0], lambda ids: ids[0]), ValueError, r"teacher_input_ids must be \[B, T\], a row for each"),
    "unattended": (
        changed(SIDE[1], lambda mask: mask.long() * 0),
        ValueError,
        r"teacher_response_mask must be True only where the token and the one before it are attended, got True at \[0, 11\]",
    ),
    "an unread key": (
        lambda batch: batch | {"teacher_labels": batch["input_ids"]},
        ValueError,
        "batch may hold input_ids, .*, token_weights, verdict, teacher_input_ids, .*, got 'teacher_labels', which is not read",
    ),
    "weights of another shape": (
        lambda batch: batch | {"token_weights": torch.ones(4, 3)},
        ValueError,
        r"token_weights must have shape \[4, 14\] \(the shape of input_ids\), got \[4, 3\]",
    ),
    "int weights": (
        lambda batch: batch | {"token_weights": torch.ones(4, 14, dtype=torch.int64)},
        TypeError,
        "token_weights must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "negative weights": (
        lambda batch: batch | {"token_weights": torch.ones(4, 14).index_fill(1, torch.tensor([6]), -0.5)},
        ValueError,
        r"token_weights must be finite and >= 0 at response tokens, got -0.5 at \[0, 6\]; 0 leaves a token out",
    ),
    "NaN weights": (
        lambda batch: batch | {"token_weights": torch.full((4, 14), torch.nan)},
        ValueError,
        "token_weights must be finite and >= 0 at response tokens, got nan",
    ),
    "weights with a gradient": (
        lambda batch: batch | {"token_weights": torch.ones(4, 14, requires_grad=True)},
        ValueError,
        "token_weights must not require grad: a weight is a constant",
    ),
    "a verdict of each token": (
        lambda batch: batch | {"verdict": batch["response_mask"]},
        ValueError,
        r"verdict must have shape \[4\] \(an entry for each rollout\), got \[4, 14\]",
    ),
    "a verdict of numbers": (
        lambda batch: batch | {"verdict": torch.ones(4)},
        TypeError,
        "verdict must be torch.bool, got torch.float32",
    ),
}
PACKED = {
    "a mask": (
        lambda batch: batch | {"teacher_attention_mask": torch.ones(4, 14)},
        ValueError,
        "batch must hold no teacher_attention_mask where input_ids are packed, got a teacher's side that is padded; pack both",
    ),
    "no offsets": (without("teacher_cu_seqlens"), ValueError, "batch must hold all of .*, got no teacher_cu_seqlens"),
    "wrong offsets": (
        changed("teacher_cu_seqlens", lambda bounds: bounds - 1),
        ValueError,
        r"teacher_cu_seqlens must be \[B \+ 1\], start at 0, .* N = 45, the length of teacher_input_ids",
    ),
    "one sequence less": (
        changed("teacher_cu_seqlens", lambda bounds: bounds[[0, 1, 2, 4]]),
        ValueError,
        "teacher_input_ids must hold a row for each of the student's 4, got 3",
    ),
    "as many in all": (
        changed("teacher_response_mask", moved_packed),
        ValueError,
        "teacher_response_mask must mark as many tokens as response_mask in each row, got 6 and 7 in row 0",
    ),
    "a first token": (
        changed("teacher_response_mask", lambda mask: torch.ones_like(mask)),
        ValueError,
        "teacher_response_mask must be False at the first token of a sequence, got True at 0",
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_bad_padded_batches_are_refused(name):
    change, error, message = PADDED[name]
    with pytest.raises(error, match=message):
        topd.OPD(*models())(change(batch_of()))


@pytest.mark.parametrize("name", PACKED)
def test_bad_packed_batches_are_refused(name):
    change, error, message = PACKED[name]
    with pytest.raises(error, match=message):
        topd.OPD(*models())(change(batch_of("packed")))


def test_what_a_method_does_not_read_is_refused():
    student, teacher = models()
    with pytest.raises(
        ValueError, match=r"batch may hold .*token_weights, verdict, got 'teacher_input_ids', which is not read"
    ):
        topd.TOPD(student, teacher)(batch_of())
    own = {key: value for key, value in batch_of("left").items() if key not in SIDE}
    both = batch_of("left") | with_topk(own, teacher)
    with pytest.raises(ValueError, match=r"batch must hold no teacher's side .* where teacher is None, got one: the top-k"):
        topd.OPD(student, None)(both)
    with pytest.raises(ValueError, match=r"batch must hold no teacher_topk_logprobs where topd.OPD has a teacher model"):
        topd.OPD(student, teacher)(both)
