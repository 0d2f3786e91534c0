"""Where windows end: at either model's end-of-sequence tokens, and those of the rollout where the response does."""

import copy

import pytest
import torch
from tiny_models import ENDS, POSITIONS, generated, prefix, ragged, tiny

import topd
from topd.branching.continuations import from_rollout
from topd.checks.rollouts import end_tokens

HORIZON = 9
# Responses of two turns, a tool's output between them: columns 4-7 and 11-20, 1-4 and 8-15, 3-12.
TURNS = ([(4, 8), (11, 20)], [(1, 5), (8, 15)], [(3, 13)])


def turns():
    response = torch.zeros(3, 20, dtype=torch.int64)
    for row, parts in enumerate(TURNS):
        for start, stop in parts:
            response[row, start:stop] = 1
    return response


def inside(positions):
    return positions[turns()[positions[:, 0], positions[:, 1]] > 0]


def lengths_by_hand(positions):
    ends = [next(stop for start, stop in TURNS[row] if start <= t < stop) for row, t in positions.tolist()]
    return [min(end - t, HORIZON) for (_, t), end in zip(positions.tolist(), ends, strict=True)]


def test_windows_end_at_either_models_end_tokens():
    """A base student beside a chat teacher: each knows tokens that end a window, and all of them end all windows."""
    student, teacher = tiny("llama"), tiny("llama", seed=5)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = ENDS[:2], torch.tensor(ENDS[1:])
    ids, mask = ragged()
    options = {"horizon": HORIZON, "temperature": 0.0}
    windows = topd.sample_windows(student, teacher, ids, mask, POSITIONS, **options)
    ended = 0
    for model, tokens, lengths in (
        (student, windows.student_tokens, windows.student_lengths),
        (teacher, windows.teacher_tokens, windows.teacher_lengths),
    ):
        for position, window, length in zip(POSITIONS, tokens.tolist(), lengths.tolist(), strict=True):
            expected = generated(model, prefix(ids, mask, position), HORIZON, ENDS)
            assert window == expected + [0] * (HORIZON - len(expected))
            assert length == len(expected)
            ended += length < HORIZON
    assert ended > 3
    whole = topd.sample_windows(student, teacher, ids, mask, POSITIONS, **options, eos_token_id=[])
    assert (whole.student_lengths == HORIZON).all()
    assert (whole.teacher_lengths == HORIZON).all()


def test_the_end_tokens_of_several_models_by_hand():
    one, other, none = (tiny("llama") for _ in range(3))
    one.generation_config.eos_token_id, other.generation_config.eos_token_id = 7, [2, 7, 5]
    assert end_tokens(None, one, other, none) == [7, 2, 5]
    assert end_tokens(None, other) == [2, 7, 5]
    assert end_tokens(4, one, other) == [4]
    assert end_tokens([], one) == end_tokens(None, none) == end_tokens(None) == []


def test_rollout_windows_end_before_a_tools_output():
    model = tiny("llama")
    ids, mask = ragged()
    positions = inside(POSITIONS)
    assert len(positions) == 8
    options = {"horizon": HORIZON, "student_window": "rollout", "temperature": 0.0, "eos_token_id": []}
    windows = topd.sample_windows(model, model, ids, mask, positions, **options, response_mask=turns())
    lengths = lengths_by_hand(positions)
    assert windows.student_lengths.tolist() == lengths
    assert {3, 1, HORIZON} <= set(lengths)
    for (row, t), window, length in zip(positions.tolist(), windows.student_tokens.tolist(), lengths, strict=True):
        assert window == ids[row, t : t + length].tolist() + [0] * (HORIZON - length)


def test_lengths_by_columns_that_are_attended():
    """Padding within a row is passed over; the first attended column that is no response ends a window."""
    generator = torch.Generator().manual_seed(4)
    attended = torch.rand(40, 12, generator=generator) < 0.7
    response = attended & (torch.rand(40, 12, generator=generator) < 0.8)
    ids, positions = torch.arange(480).view(40, 12), response.nonzero()
    tokens, lengths, _ = from_rollout(ids, attended, positions, 5, response)
    for (row, column), window, length in zip(positions.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        expected = []
        for t in range(column, 12):
            if attended[row, t] and not response[row, t]:
                break
            expected += [int(ids[row, t])] * bool(attended[row, t])
        assert window == (expected + [0] * 5)[:5]
        assert length == min(len(expected), 5)
    for shape in ((0, 3), (2, 0)):
        none = torch.zeros(shape, dtype=torch.bool)
        assert from_rollout(none.long(), none, positions[:0], 5, none).tokens.shape == (0, 5)


@pytest.mark.parametrize("equal", [True, False])
def test_noise_given_the_rollout_ends_with_the_response(equal):
    """A teacher's window stops where the response does, unless that ends by an end token; its tokens are those of the window
    that no mask cuts, and those of the rollout where the teacher equals the student."""
    student = tiny("llama")
    teacher = copy.deepcopy(student) if equal else tiny("qwen3", seed=5)
    ids, mask = ragged()
    ids[0, 7] = ENDS[0]
    positions = inside(POSITIONS)
    options = {"horizon": HORIZON, "student_window": "rollout", "window_noise": "counterfactual", "eos_token_id": ENDS}

    def windows_of(**own):
        generator = torch.Generator().manual_seed(3)
        return topd.sample_windows(student, teacher, ids, mask, positions, **options, **own, generator=generator)

    cut, whole = windows_of(response_mask=turns()), windows_of()
    beyond = 0
    for index, length in enumerate(lengths_by_hand(positions)):
        ended = int(cut.student_tokens[index, length - 1]) in ENDS
        own, uncut = int(cut.teacher_lengths[index]), int(whole.teacher_lengths[index])
        assert ended or own == min(uncut, length)
        same = min(own, uncut, length)
        assert torch.equal(cut.teacher_tokens[index, :same], whole.teacher_tokens[index, :same])
        beyond += own > length
        if equal:
            assert torch.equal(cut.teacher_tokens[index, :same], cut.student_tokens[index, :same])
            assert own == length or int(cut.teacher_tokens[index, own - 1]) in ENDS
    assert equal or beyond > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"response_mask": torch.ones(3, 20)}, TypeError, "response_mask must be bool or integers 0 and 1"),
        ({"response_mask": torch.ones(3, 19, dtype=torch.int64)}, ValueError, r"response_mask must have shape \[3, 20\]"),
        (
            {"response_mask": turns()},
            ValueError,
            r"positions must be response tokens, where response_mask is True, got \[0, 8\] \(index 8\); select them among",
        ),
    ],
    ids=str,
)
def test_a_wrong_response_mask_is_refused(options, error, message):
    model = tiny("llama")
    with pytest.raises(error, match=message):
        topd.sample_windows(model, model, *ragged(), POSITIONS, **options)
