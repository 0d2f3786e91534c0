"""Tokenizers of student and teacher are compared where they are to be had: what is equal, what differs, who looks."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny, word_tokenizer
from trainer_cases import arguments

import topd
from topd.integrations.tokenizers import check_same_tokenizer, check_tokenizers, tokenizer_in_folder
from topd.integrations.transformers import DistillationTrainer

WORDS = ("<pad>", "<end>", "sky", "blue", "why")


class Vocabulary:
    """What is asked of a tokenizer."""

    def __init__(self, **ids):
        self.ids = ids

    def get_vocab(self):
        return self.ids


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def teacher_in(folder, tokenizer):
    """A model as `from_pretrained(folder)` leaves it, its tokenizer beside it."""
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(config=SimpleNamespace(name_or_path=str(folder)))


def test_the_same_words_are_the_same_tokenizer():
    check_same_tokenizer(word_tokenizer(*WORDS), word_tokenizer(*WORDS))


def test_tokens_that_only_one_has_are_no_difference():
    longer = word_tokenizer(*WORDS, "extra")
    longer.add_tokens(["<think>"])
    check_same_tokenizer(word_tokenizer(*WORDS), longer)
    check_same_tokenizer(longer, word_tokenizer(*WORDS))


def test_an_id_of_two_meanings_is_refused_by_name():
    message = (
        "processing_class must mean the same tokens by its ids as the teacher's tokenizer, got a difference at 2 of 5 ids: "
        "2 is 'sky' of the student and 'blue' of the teacher; 3 is 'blue' of the student and 'sky' of the teacher; "
    )
    with refused(message):
        check_same_tokenizer(word_tokenizer(*WORDS), word_tokenizer("<pad>", "<end>", "blue", "sky", "why"))


def test_added_tokens_count():
    student, teacher = word_tokenizer(*WORDS), word_tokenizer(*WORDS)
    student.add_tokens(["<think>"])
    teacher.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with refused("a difference at 1 of 6 ids: 5 is '<think>' of the student and '<image>' of the teacher"):
        check_same_tokenizer(student, teacher)


def test_a_token_of_two_ids_is_refused_even_where_neither_id_is_in_both():
    with refused("a difference at 1 of 2 ids: 1 is 'sky' of the student and 'no token' of the teacher"):
        check_same_tokenizer(Vocabulary(pad=0, sky=1), Vocabulary(pad=0, sky=2))


def test_two_tokens_of_one_id_are_equal_in_both_orders():
    check_same_tokenizer(Vocabulary(pad=0, unk=0, sky=1), Vocabulary(unk=0, pad=0, sky=1))


def test_processors_bring_their_tokenizers_and_other_things_are_refused():
    processor = SimpleNamespace(tokenizer=word_tokenizer(*WORDS))
    check_same_tokenizer(processor, word_tokenizer(*WORDS))
    with pytest.raises(TypeError, match=r"teacher_processing_class must be a tokenizer with get_vocab, .* got str"):
        check_same_tokenizer(processor, "a name")
    with pytest.raises(TypeError, match=r"processing_class must be a tokenizer with get_vocab, .* got SimpleNamespace"):
        check_same_tokenizer(SimpleNamespace(), processor)


def test_a_teachers_folder_has_its_tokenizer(tmp_path):
    other = word_tokenizer("<pad>", "<end>", "why", "blue", "sky")
    teacher = teacher_in(tmp_path, other)
    assert tokenizer_in_folder(teacher).get_vocab() == other.get_vocab()
    check_tokenizers(other, None, teacher)
    with refused("2 is 'sky' of the student and 'why' of the teacher"):
        check_tokenizers(word_tokenizer(*WORDS), None, teacher)
    check_tokenizers(word_tokenizer(*WORDS), word_tokenizer(*WORDS), teacher)


def test_nothing_is_fetched_and_what_is_not_there_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps("of something else"))
    for name in ("", None, "no-such-owner/no-such-model", str(tmp_path / "nowhere")):
        teacher = SimpleNamespace(config=SimpleNamespace(name_or_path=name))
        assert tokenizer_in_folder(teacher) is None
        check_tokenizers(word_tokenizer(*WORDS), None, teacher)
    assert tokenizer_in_folder(torch.nn.Linear(1, 1)) is None
    check_tokenizers(None, None, teacher)


def test_a_teachers_tokenizer_alone_is_refused():
    with refused("processing_class must be the student's tokenizer where teacher_processing_class is given, got None"):
        check_tokenizers(None, word_tokenizer(*WORDS), None)


def test_transformers_trainer_compares_them(tmp_path):
    words = [f"word{number}" for number in range(61)]
    own, other = word_tokenizer(*words), word_tokenizer(*reversed(words))
    objective = topd.OPD(tiny("llama"), tiny("qwen3"))
    DistillationTrainer(objective, arguments(tmp_path), processing_class=own, teacher_processing_class=own)
    with refused("a difference at 60 of 61 ids: 0 is 'word0' of the student and 'word60' of the teacher"):
        DistillationTrainer(objective, arguments(tmp_path), processing_class=own, teacher_processing_class=other)
    with refused("got None; give both"):
        DistillationTrainer(objective, arguments(tmp_path), teacher_processing_class=other)
    objective.allow_unequal_vocabularies = True
    DistillationTrainer(objective, arguments(tmp_path), processing_class=own, teacher_processing_class=other)


def test_transformers_trainer_looks_into_the_teachers_folder(tmp_path):
    own, other = word_tokenizer(*WORDS), word_tokenizer(*reversed(WORDS))
    student, teacher = tiny("llama"), tiny("qwen3")
    teacher.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    with refused("got a difference at 4 of 5 ids: 0 is '<pad>' of the student and 'why' of the teacher"):
        DistillationTrainer(topd.OPD(student, loaded), arguments(tmp_path), processing_class=own)
    DistillationTrainer(topd.OPD(student, loaded), arguments(tmp_path), processing_class=other)
