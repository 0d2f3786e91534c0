"""sample_rollouts: the batch it makes, the distribution it draws from, and that it leaves the model as it was."""

import pytest
import torch
from tiny_models import VOCAB, generated, tiny

from topd.integrations.rollouts import pack_rollouts, sample_rollouts, with_teacher_prompts

ENDS = [3, 9, 27]


def prompts():
    """Three prompts of 5, 3 and 1 tokens, left-padded."""
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, :2] = mask[2, :4] = 0
    return torch.arange(10, 25).view(3, 5), mask


def test_greedy_responses_are_those_of_generate_from_each_prompt_alone():
    model, (ids, mask) = tiny("llama", initializer_range=0.2), prompts()
    rollouts = sample_rollouts(model, ids, mask, max_new_tokens=6, temperature=0.0)
    for row in range(3):
        alone = generated(model, ids[row, mask[row] > 0].unsqueeze(0), 6, None)
        assert rollouts["input_ids"][row, 5:].tolist() == alone
    assert torch.equal(rollouts["input_ids"][:, :5], ids)
    assert torch.equal(rollouts["attention_mask"], torch.cat([mask > 0, torch.ones(3, 6, dtype=torch.bool)], dim=1))
    assert torch.equal(rollouts["response_mask"], torch.tensor([[False] * 5 + [True] * 6] * 3))


@pytest.mark.parametrize("given", ["argument", "generation_config"])
def test_a_response_ends_with_its_first_end_of_sequence(given):
    """The token counts; what follows is padding and not attended."""
    model, (ids, mask) = tiny("llama"), prompts()
    options = {"eos_token_id": ENDS, "pad_token_id": 60} if given == "argument" else {}
    if not options:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = ENDS, 60
    torch.manual_seed(3)
    rollouts = sample_rollouts(model, ids.repeat(8, 1), mask.repeat(8, 1), max_new_tokens=30, **options)
    ended = 0
    for tokens, kept in zip(rollouts["input_ids"][:, 5:].tolist(), rollouts["response_mask"][:, 5:].tolist(), strict=True):
        length = sum(kept)
        assert kept == [True] * length + [False] * (len(kept) - length)
        assert not set(tokens[: length - 1]) & set(ENDS)
        assert set(tokens[length:]) <= {60}
        ended += tokens[length - 1] in ENDS
    assert ended > 4
    assert torch.equal(rollouts["attention_mask"][:, 5:], rollouts["response_mask"][:, 5:])


def test_draws_follow_the_models_full_distribution_whatever_its_generation_config_says():
    model, (ids, mask) = tiny("llama", initializer_range=0.05), prompts()
    own = model.generation_config
    own.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, min_p=0.9, suppress_tokens=[5, 6], num_beams=3)
    torch.manual_seed(0)
    many = 4_000
    rollouts = sample_rollouts(model, ids[:1].expand(many, -1), mask[:1].expand(many, -1), max_new_tokens=1, temperature=2.0)
    share = rollouts["input_ids"][:, 5].bincount(minlength=VOCAB) / many
    with torch.no_grad():
        expected = (model(ids[:1]).logits[0, -1] / 2.0).softmax(-1)
    deviation = (share - expected).abs() / (expected * (1 - expected) / many).sqrt()
    assert deviation.max() < 4.5
    assert model.generation_config is own
    assert own.top_k == 1


def test_top_k_and_top_p_leave_the_most_likely_tokens():
    """The fewest that hold top_p of the mass of the top_k, drawn in their shares; alone and together."""
    model, (ids, mask) = tiny("llama", initializer_range=0.2), prompts()
    with torch.no_grad():
        whole = (model(ids[:1]).logits[0, -1] / 1.5).softmax(-1)
    many = 2_000
    for top_k, top_p in ((4, 1.0), (None, 0.3), (12, 0.5)):
        probs, order = whole.sort(descending=True)
        probs = torch.where(torch.arange(VOCAB) < (top_k or VOCAB), probs, 0.0)
        probs = probs / probs.sum()
        probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
        expected = torch.zeros(VOCAB).scatter(0, order, probs / probs.sum())
        torch.manual_seed(0)
        options = {"max_new_tokens": 1, "temperature": 1.5, "samples_per_prompt": many}
        rollouts = sample_rollouts(model, ids[:1], mask[:1], top_k=top_k, top_p=top_p, **options)
        share = rollouts["input_ids"][:, 5].bincount(minlength=VOCAB) / many
        assert set(share.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
        assert 1 < len(expected.nonzero()) < 13
        deviation = (share - expected).abs() / (expected * (1 - expected) / many).sqrt().clamp_min(1e-9)
        assert deviation.max() < 4.5


def test_the_samples_of_a_prompt_stand_together():
    model, (ids, mask) = tiny("llama", initializer_range=0.05), prompts()
    torch.manual_seed(0)
    rollouts = sample_rollouts(model, ids, mask, max_new_tokens=4, samples_per_prompt=3)
    assert rollouts["input_ids"].shape == (9, 9)
    assert torch.equal(rollouts["input_ids"][:, :5], ids[[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    assert torch.equal(rollouts["attention_mask"][:, :5], mask[[0, 0, 0, 1, 1, 1, 2, 2, 2]] > 0)
    assert len({tuple(row) for row in rollouts["input_ids"][:3, 5:].tolist()}) == 3


def test_a_response_goes_behind_the_teachers_prompt_too():
    """Prompts of 2 and 1 tokens for the student, 1 and 3 for the teacher; a tool wrote the second token of a response."""
    rollouts = {
        "input_ids": torch.tensor([[1, 2, 10, 11, 12], [0, 3, 20, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]),
        "response_mask": torch.tensor([[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]),
        "problem": ["one", "two"],
    }
    teacher = torch.tensor([[0, 0, 7], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    pairs = with_teacher_prompts(rollouts, *teacher)
    assert {key: pairs[key] for key in rollouts} == rollouts
    assert pairs["teacher_input_ids"].tolist() == [[0, 0, 7, 10, 11, 12], [4, 5, 6, 20, 0, 0]]
    assert pairs["teacher_attention_mask"].long().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert pairs["teacher_response_mask"].long().tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"teacher_input_ids must have a row for each of input_ids, 2, got 1; .*repeat_inter"):
        with_teacher_prompts(rollouts, teacher[0][:1], teacher[1][:1])
    with pytest.raises(ValueError, match=r"teacher_attention_mask must be padded on the left .* row 0; tokenize"):
        with_teacher_prompts(rollouts, teacher[0], teacher[1].flip(-1))
    with pytest.raises(ValueError, match=r"teacher_input_ids must be \[B, T\]"):
        with_teacher_prompts(rollouts, teacher[0][0], teacher[1][0])
    with pytest.raises(ValueError, match=r"a batch must hold response_mask, got \['attention_mask', 'input_ids'\]"):
        with_teacher_prompts({key: rollouts[key] for key in ("input_ids", "attention_mask")}, *teacher)


@pytest.mark.parametrize("last", [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
def test_prompts_that_end_elsewhere_are_no_responses(last):
    """A prompt that is a column longer, a row with no response whose prompt goes on, and one whose prompt is shorter."""
    masks = torch.tensor([[0, 0, 1, 1, 1], last])
    rollouts = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones_like(masks), "response_mask": masks}
    row, column = (0, 0) if last[0] else (1, 2)
    message = f"response_mask must begin in the same column in each row, .* got column {column} and another place in row {row}"
    with pytest.raises(ValueError, match=message):
        with_teacher_prompts(rollouts, torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))


def test_the_model_is_in_eval_mode_meanwhile_and_its_modes_come_back():
    model, (ids, mask) = tiny("llama"), prompts()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    rollouts = sample_rollouts(model, ids, mask > 0, max_new_tokens=2)
    handle.remove()
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes
    assert all(not value.requires_grad for value in rollouts.values())
    model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_rollouts(model, ids, mask, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_adapters_and_wrappers_are_looked_through():
    peft = pytest.importorskip("peft")
    ids, mask = prompts()
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    rollouts = sample_rollouts(torch.nn.DataParallel(adapted), ids, mask, max_new_tokens=4, temperature=0.0)
    expected = adapted.eval().generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(rollouts["input_ids"], expected)
    prompted = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="model must continue from input_ids alone, got PEFT's PromptTuningConfig"):
        sample_rollouts(prompted, ids, mask, max_new_tokens=2)


def test_packing_leaves_the_padding_out():
    """Rows of 2 + 2, 1 + 1 and 3 + 0 tokens."""
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 8], [0, 0, 9, 4, 0], [1, 2, 3, 0, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "response_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]) > 0,
    }
    packed = pack_rollouts(batch)
    assert packed["input_ids"].tolist() == [5, 6, 7, 8, 9, 4, 1, 2, 3]
    assert packed["response_mask"].long().tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 0]
    assert packed["cu_seqlens"].tolist() == [0, 4, 6, 9]
    assert packed["cu_seqlens"].dtype == torch.int32
    with pytest.raises(ValueError, match="batch must hold input_ids, attention_mask and response_mask"):
        pack_rollouts({"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eos_token_id": -1}, ValueError, "eos_token_id must be >= 0"),
        ({"eos_token_id": [2, -1]}, ValueError, "eos_token_id must be >= 0"),
        ({"max_new_tokens": 10**30}, ValueError, "max_new_tokens must be at most"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be > 0, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got float"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0, got -1.0; 0 is greedy"),
        ({"top_p": 0.0}, ValueError, "top_p must be finite and > 0 and <= 1, got 0.0"),
        ({"top_k": 0}, ValueError, "top_k must be > 0, got 0; or None, for all tokens"),
        ({"samples_per_prompt": 0}, ValueError, "samples_per_prompt must be > 0, got 0"),
        ({"eos_token_id": "2"}, TypeError, "eos_token_id must be an int, a list of ints or None, got '2'"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be > 0, got -1; or 0"),
        ({"input_ids": torch.ones(3, 5)}, TypeError, "input_ids must be torch.int64"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, ValueError, r"input_ids must be \[B, T\]"),
        (
            {"input_ids": torch.ones(3, 0, dtype=torch.int64), "attention_mask": torch.ones(3, 0, dtype=torch.bool)},
            ValueError,
            r"input_ids must hold a prompt in each row, got \[3, 0\]",
        ),
        ({"attention_mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "attention_mask must have shape"),
        ({"attention_mask": prompts()[1].flip(-1)}, ValueError, "attention_mask must be padded on the left .* row 1"),
        (
            {"attention_mask": torch.zeros(3, 5, dtype=torch.bool)},
            ValueError,
            "attention_mask must be padded on the left .* row 0",
        ),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a transformers causal language model"),
    ],
)
def test_bad_calls_are_refused(change, error, message):
    ids, mask = prompts()
    given = {"model": tiny("llama"), "input_ids": ids, "attention_mask": mask, "max_new_tokens": 2} | change
    with pytest.raises(error, match=message):
        sample_rollouts(given.pop("model"), **given)
