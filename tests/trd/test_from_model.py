"""A model of transformers as a generator: draws that belong to a problem, ends, lengths, modes."""

import pytest
import torch
from tiny_models import tiny
from trd_cases import TOKENIZER

from topd.trd import FromModel, Prompt, Request, Sampling, generate, read_run
from topd.trd.from_model import _Draw

SIZE = len(TOKENIZER)
END = TOKENIZER.eos_token_id


def model(kind: str = "llama", **options):
    """Ends its answers now and then."""
    llm = tiny(kind, vocab_size=SIZE, **options)
    llm.lm_head.weight.data[END] += 0.3 * llm.lm_head.weight.data.std() * torch.randn(32)
    llm.generation_config.eos_token_id = END
    return llm


PROBLEMS = [{"id": str(number), "problem": "ab" * number} for number in range(1, 8)]
OPTIONS = {"chat": False, "max_new_tokens": 12, "progress": False, "temperature": 1.0, "top_k": None, "top_p": 1.0}


def texts(path):
    return {record["id"]: (record["text"], record["status"], record["tokens"]) for record in read_run(path)[1]}


@pytest.mark.parametrize("kind", ["llama", "gemma3_sliding"])
def test_an_answer_does_not_depend_on_its_batch_or_on_stops(tmp_path, kind):
    llm = model(kind)
    generate(PROBLEMS, FromModel(llm, TOKENIZER, batch_size=3), tmp_path / "whole", **OPTIONS)
    generate(PROBLEMS, FromModel(llm, TOKENIZER, batch_size=1), tmp_path / "alone", **OPTIONS)
    generate(PROBLEMS[:2], FromModel(llm, TOKENIZER), tmp_path / "resumed", **OPTIONS)
    torch.rand(5)
    generate(PROBLEMS, FromModel(llm, TOKENIZER), tmp_path / "resumed", **OPTIONS)
    whole = texts(tmp_path / "whole")
    assert whole == texts(tmp_path / "alone") == texts(tmp_path / "resumed")
    assert len({text for text, *_ in whole.values()}) == 7
    generate(PROBLEMS, FromModel(llm, TOKENIZER), tmp_path / "other", **OPTIONS, seed=1)
    assert texts(tmp_path / "other") != whole


def test_greedy_answers_are_those_of_generate(tmp_path):
    llm = model()
    llm.generation_config.repetition_penalty = 5.0  # as a hub's model may have it: not meant here
    generate(PROBLEMS, FromModel(llm, TOKENIZER, 4), tmp_path / "a", **{**OPTIONS, "temperature": 0.0})
    assert llm.generation_config.repetition_penalty == 5.0
    llm.generation_config.repetition_penalty = 1.0
    for problem in PROBLEMS:
        record = texts(tmp_path / "a")[problem["id"]]
        prompt = f"{problem['problem']}\n\nReason step by step, and put the final answer in \\boxed{{}}.\n"
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        tokens = llm.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        ended = END in tokens
        expected = tokens[: tokens.index(END)] if ended else tokens
        text = TOKENIZER.decode(expected, skip_special_tokens=True)
        assert record == (text, "length" if not ended else "ok" if text.strip() else "empty", len(expected))


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]])
    for sampling, allowed in (
        (Sampling(1.0, 1.0, None, 1), {0, 1, 2, 3, 4}),
        (Sampling(1.0, 1.0, 2, 1), {1, 2}),
        (Sampling(1.0, 0.7, None, 1), {1, 2}),
        (Sampling(1.0, 0.01, None, 1), {1}),
        (Sampling(0.5, 0.9, 3, 1), {1, 2}),
    ):
        rows = 4000
        drawn = _Draw(sampling, list(range(rows)), torch.device("cpu"))(None, logits.expand(rows, -1)).argmax(-1)
        probs = (logits[0] / sampling.temperature).softmax(-1)
        probs[[token for token in range(5) if token not in allowed]] = 0
        counts = torch.bincount(drawn, minlength=5) / rows
        torch.testing.assert_close(counts, probs / probs.sum(), atol=0.03, rtol=0)
        assert set(drawn.tolist()) == allowed


def test_modes_and_the_random_state_stay(tmp_path):
    llm = model().train()
    llm.model.layers[0].eval()
    before = [module.training for module in llm.modules()]
    state, own = torch.get_rng_state(), llm.generation_config
    generate(PROBLEMS[:2], FromModel(llm, TOKENIZER), tmp_path / "a", **OPTIONS)
    assert [module.training for module in llm.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert llm.generation_config is own


def test_what_the_model_has_no_positions_for_is_too_long(tmp_path):
    llm = model()
    problems = [{"problem": "a" * 200}, {"problem": "a"}]
    done = generate(problems, FromModel(llm, TOKENIZER), tmp_path / "a", **OPTIONS)
    assert done.statuses.get("too_long") == 1
    record = next(record for record in read_run(tmp_path / "a")[1] if record["id"] == "0")
    assert "the 12 of max_new_tokens exceed the model's 256" in record["reason"]


def test_the_chat_template_is_the_tokenizers(tmp_path):
    llm, seen = model(), []
    generate_ = llm.generate
    llm.generate = lambda ids, **options: seen.append(ids) or generate_(ids, **options)
    generate([{"problem": "hi"}], FromModel(llm, TOKENIZER), tmp_path / "a", **{**OPTIONS, "chat": True})
    text = TOKENIZER.decode(seen[0][0])
    assert text.startswith("<user> hi")
    assert text.endswith("<assistant> <nothink> ")


def test_padding_is_on_the_left_and_masked():
    seen = []
    llm = model()
    generate_ = llm.generate
    llm.generate = lambda ids, **options: seen.append((ids, options["attention_mask"])) or generate_(ids, **options)
    requests = [Request(str(n), Prompt("a" * n), Sampling(0.0, 1.0, None, 2), 0, chat=False) for n in (1, 4)]
    assert len(list(FromModel(llm, TOKENIZER).answers(requests))) == 2
    ((ids, mask),) = seen
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert ids[0, :3].tolist() == [0, 0, 0]


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="model must have generate, got Linear"):
        FromModel(torch.nn.Linear(1, 1), TOKENIZER)
    with pytest.raises(ValueError, match="batch_size must be > 0"):
        FromModel(model(), TOKENIZER, 0)
