"""topd.pair: lists of token ids in, a batch of both sides out; what pairs cost beside plain OPD."""

import pytest
import torch
from objective_cases import models as float32_models
from pair_cases import models
from peak_memory import peak_bytes
from tiny_models import tiny

import topd
from topd.trd.batches import TokenPairs


def test_two_rows_by_hand():
    batch = topd.pair([[1, 2], [3]], [[4], [5, 6, 7]], [[8], [9, 10]], pad_token_id=0)
    expected = {
        "input_ids": [[1, 2, 8, 0], [0, 3, 9, 10]],
        "attention_mask": [[1, 1, 1, 0], [0, 1, 1, 1]],
        "response_mask": [[0, 0, 1, 0], [0, 0, 1, 1]],
        "teacher_input_ids": [[0, 0, 4, 8, 0], [5, 6, 7, 9, 10]],
        "teacher_attention_mask": [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]],
        "teacher_response_mask": [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
    }
    assert {key: value.long().tolist() for key, value in batch.items()} == expected
    assert {value.dtype for key, value in batch.items() if "mask" in key} == {torch.bool}
    assert {value.dtype for key, value in batch.items() if "ids" in key} == {torch.int64}


def test_the_pairs_of_a_run_feed_it():
    student, teacher = models()
    pairs = TokenPairs(ids=["a"], prompts=[[1, 2]], teacher_prompts=[[1, 2, 3]], responses=[[4, 5]], verdicts=[True])
    batch = topd.pair(pairs.prompts, pairs.teacher_prompts, pairs.responses, 0) | {"verdict": torch.tensor(pairs.verdicts)}
    assert topd.TRD(student, teacher)(batch).metrics["tokens"] == 2


def test_an_empty_response_is_a_row_without_tokens():
    batch = topd.pair([[1]], [[2, 3]], [[]], pad_token_id=5)
    assert batch["input_ids"].tolist() == [[1]]
    assert batch["teacher_input_ids"].tolist() == [[2, 3]]
    assert not batch["response_mask"].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([[1]], [[1], [2]], [[3]], 0),
            ValueError,
            "teacher_prompts must hold a list for each of the 1 prompts, got 2; repeat",
        ),
        (([[1]], [[1]], [], 0), ValueError, "responses must hold a list for each of the 1 prompts, got 0"),
        (
            ([[1], []], [[1], [2]], [[3], [4]], 0),
            ValueError,
            "prompts must hold a token at least in each list, got none in row 1",
        ),
        (([[1]], [[]], [[3]], 0), ValueError, "teacher_prompts must hold a token at least in each list, got none in row 0"),
        (([[1.0]], [[1]], [[3]], 0), TypeError, r"prompts\[0\] must hold ids, ints, got float; tokenize it first"),
        (([[1]], [[True]], [[3]], 0), TypeError, r"teacher_prompts\[0\] must hold ids, ints, got bool"),
        (([[1]], [[1]], [["a"]], 0), TypeError, r"responses\[0\] must hold ids, ints, got str"),
        (([[1]], [[1]], ["ab"], 0), TypeError, r"responses\[0\] must be a list of ids, got str"),
        (
            ([[1]], [[1]], [torch.ones(2)], 0),
            TypeError,
            r"responses\[0\] must be a list of ids, got Tensor; a tensor has \.tolist",
        ),
        ((torch.ones(1, 2), [[1]], [[3]], 0), TypeError, "prompts must be a list of lists of ids, got Tensor"),
        (([[1]], [[1]], [[-3]], 0), ValueError, r"responses\[0\] must hold ids, ints >= 0, got -3"),
        (([[1]], [[1]], [[2**63]], 0), ValueError, r"responses\[0\] must hold ids, ints >= 0, got 9223372036854775808"),
        (([[1]], [[1]], [[3]], None), TypeError, "pad_token_id must be an id, an int, got NoneType"),
        (([[1]], [[1]], [[3]], -1), ValueError, "pad_token_id must be >= 0, got -1"),
    ],
)
def test_bad_lists_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        topd.pair(*arguments)


def test_pairs_need_no_more_memory_than_plain_opd():
    """The same tokens, as the student's alone, with the teacher's side, and behind a longer prompt there: within 5 %."""
    options = {"vocab_size": 2000, "hidden_size": 64, "initializer_range": 0.05}
    student, teacher = tiny("llama", **options), tiny("qwen3", seed=3, **options)
    generator = torch.Generator().manual_seed(0)
    prompts, responses, longer = (torch.randint(2000, (2, n), generator=generator).tolist() for n in (20, 100, 70))
    batches = [topd.pair(prompts, other, responses, pad_token_id=0) for other in (prompts, longer)]
    plain = {key: value for key, value in batches[0].items() if not key.startswith("teacher_")}

    def step(given):
        student.zero_grad()
        topd.OPD(student, teacher)(given).loss.backward()

    peaks = []
    for given in (plain, *batches):
        step(given)
        peaks.append(peak_bytes(lambda given=given: step(given)))
    assert max(peaks[1:]) <= 1.05 * peaks[0]


def test_float32_models_train():
    student, teacher = float32_models()
    batch = topd.pair([[1, 2]], [[3, 4, 5]], [[6, 7]], pad_token_id=0)
    step = topd.TRD(student, teacher)(batch)
    step.loss.backward()
    assert step.loss.dtype == torch.float32
    assert step.loss > 0
