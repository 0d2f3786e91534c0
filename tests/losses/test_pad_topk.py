"""topd.pad_topk: ragged answers of a server become the tensors of a top-k teacher."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from objective_cases import batch_of, models
from topk_teacher_cases import with_topk

import topd

INF = torch.inf


@dataclass
class Logprob:
    """As vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


RAGGED = [[None, {5: -0.5, 7: -1.5}, {3: -0.25}], [{1: -0.125, 2: -2.5, 9: -4.0}]]
LOGPROBS = [[[-INF] * 3, [-0.5, -1.5, -INF], [-0.25, -INF, -INF]], [[-0.125, -2.5, -4.0], [-INF] * 3, [-INF] * 3]]
IDS = [[[0, 0, 0], [5, 7, 0], [3, 0, 0]], [[1, 2, 9], [0, 0, 0], [0, 0, 0]]]


def mapped(change):
    return [[None if token is None else change(token) for token in sequence] for sequence in RAGGED]


FORMS = {
    "numbers": RAGGED,
    "vllm": mapped(lambda token: {key: Logprob(value, rank=1) for key, value in token.items()}),
    "json": json.loads(json.dumps(mapped(lambda token: {key: {"logprob": value, "rank": 1} for key, value in token.items()}))),
    "numpy": mapped(lambda token: list(zip(np.array(list(token)), np.float32(list(token.values())), strict=True))),
    "pairs": mapped(lambda token: list(token.items())),
    "tuples": tuple(tuple([] if token is None else tuple(token.items()) for token in sequence) for sequence in RAGGED),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_an_answer_is_padded(form):
    logprobs, ids = topd.pad_topk(FORMS[form])
    assert logprobs.tolist() == LOGPROBS
    assert ids.tolist() == IDS
    assert (logprobs.dtype, ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_says_where_the_tokens_stand(dtype):
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).to(dtype)
    topk = topd.pad_topk(RAGGED, mask, k=4)
    assert topk.ids.shape == topk.logprobs.shape == (2, 4, 4)
    assert topk.ids[0, 1:, :3].tolist() == IDS[0]
    assert topk.logprobs[0, 1:, :3].tolist() == LOGPROBS[0]
    assert topk.ids[1, 2].tolist() == [1, 2, 9, 0]
    assert topk.logprobs[mask == 0].isneginf().all()
    assert topk.logprobs[..., 3].isneginf().all()
    assert not topk.ids[mask == 0].any()


def test_no_sequence_no_token_and_no_answer_are_padding():
    assert topd.pad_topk([]).ids.shape == (0, 0, 1)
    assert topd.pad_topk([[], []]).ids.shape == (2, 0, 1)
    logprobs, ids = topd.pad_topk([[None, {}]], k=2)
    assert logprobs.isneginf().all()
    assert ids.tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize("mask_key", ["attention_mask", "response_mask"])
def test_a_servers_answers_train(mask_key):
    """Padded from lists the batch is the one of tensors, wherever the padding is."""
    student, teacher = models()
    batch = with_topk(batch_of(), teacher)
    answers = [[] for _ in range(3)]
    for row, column in batch[mask_key].nonzero().tolist():
        pairs = zip(
            batch["teacher_topk_ids"][row, column].tolist(), batch["teacher_topk_logprobs"][row, column].tolist(), strict=True
        )
        answers[row].append({token: logprob for token, logprob in pairs if logprob > -INF} or None)
    logprobs, ids = topd.pad_topk(answers, batch[mask_key])
    again = batch | {"teacher_topk_logprobs": logprobs, "teacher_topk_ids": ids}
    objective = topd.OPD(student, None)
    assert torch.equal(objective(again).loss, objective(batch).loss)


@pytest.mark.parametrize(
    ("answers", "options", "error", "message"),
    [
        ({}, {}, TypeError, "answers must be a list, got dict"),
        ([{5: -0.5}], {}, TypeError, r"answers\[0\] must be a list, got dict; give a list of sequences"),
        ([[3]], {}, TypeError, r"answers\[0\]\[0\] must be a mapping of ids to log-probabilities, .* got int"),
        ([["abc"]], {}, TypeError, r"answers\[0\]\[0\] must be a mapping .* got str"),
        ([[[(-0.5, 7, "a")]]], {}, TypeError, r"answers\[0\]\[0\] must be .* got the entry \(-0.5, 7, 'a'\)"),
        ([[[(-0.5, 7)]]], {}, TypeError, r"answers\[0\]\[0\] must have token ids, ints or decimal strings, got -0.5"),
        ([[{" the": -0.5}]], {}, TypeError, "must have token ids, .* got ' the'; ask the server for ids"),
        ([[{True: -0.5}]], {}, TypeError, "must have token ids, .* got True"),
        ([[{-1: -0.5}]], {}, ValueError, "must have token ids >= 0, got -1"),
        ([[{3: "x"}]], {}, TypeError, "must have a number as the log-probability of 3, got 'x'"),
        ([[{3: 2.5}]], {}, ValueError, "must have log-probabilities, at most 0, got 2.5 for 3"),
        ([[{3: float("nan")}]], {}, ValueError, "must have log-probabilities, at most 0, got nan for 3"),
        (RAGGED, {"k": 2}, ValueError, "k must be at least the 3 entries that a token has, got 2"),
        (RAGGED, {"k": 0}, ValueError, "k must be > 0, got 0"),
        (RAGGED, {"mask": torch.ones(2, 3)}, ValueError, r"mask must be bool or integers .* got torch.float32 \[2, 3\]"),
        (RAGGED, {"mask": torch.ones(3, 3).bool()}, ValueError, r"mask must be .* \[2, T\], a row for each sequence, got"),
        (
            RAGGED,
            {"mask": torch.ones(2, 3).bool()},
            ValueError,
            "mask must mark as many tokens as answers has, 1 of sequence 1, got 3; take attention_mask",
        ),
        (RAGGED, {"mask": [[1]]}, TypeError, "mask must be a torch.Tensor, got list"),
    ],
)
def test_other_forms_are_refused_by_name(answers, options, error, message):
    with pytest.raises(error, match=message):
        topd.pad_topk(answers, **options)
