"""topd.sample_windows: greedy windows equal generate's from each prefix alone, sampled ones follow the model."""

import math

import pytest
import smollm2_cases
import torch
from compare import assert_near
from scipy.stats import chi2
from smollm2_cases import needs_model
from tiny_models import ENDS, KINDS, POSITIONS, VOCAB, bloom, checkpoint_activations, generated, prefix, ragged, tiny

import topd
from topd.branching import decode
from topd.branching.continuations import continue_from
from topd.checks.rollouts import check_rollouts
from topd.models.decoder import decoder_of
from topd.models.sampling import Sampling, most_likely

HORIZON = 9


def greedy(student, teacher, ids, mask, positions=POSITIONS, **options):
    settings = {"horizon": HORIZON, "temperature": 0, "eos_token_id": ENDS} | options
    return topd.sample_windows(student, teacher, ids, mask, positions, **settings)


def assert_windows(model, ids, mask, positions, tokens, lengths, ends=ENDS, horizon=HORIZON):
    """Every window is what the model generates from its prefix, 0 past its length."""
    for position, window, length in zip(positions, tokens, lengths, strict=True):
        expected = generated(model, prefix(ids, mask, position), horizon, ends)
        assert window.tolist() == expected + [0] * (horizon - len(expected))
        assert length == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_windows_equal_generate_from_each_prefix_alone(kind):
    """Ragged rollouts, windows that end early and windows that do not, both models."""
    student, teacher = tiny(kind), tiny("llama", seed=5)
    ids, mask = ragged()
    windows = greedy(student, teacher, ids, mask)
    assert windows.student_way == windows.teacher_way == "branches"
    assert_windows(student, ids, mask, POSITIONS, windows.student_tokens, windows.student_lengths)
    assert_windows(teacher, ids, mask, POSITIONS, windows.teacher_tokens, windows.teacher_lengths)
    assert torch.equal(windows.positions, POSITIONS)
    assert {t.dtype for t in (windows.student_tokens, windows.teacher_tokens, windows.student_lengths)} == {torch.int64}


@pytest.mark.parametrize("kind", ["llama", "llama_eager", "gemma3_sliding"])
def test_some_of_these_windows_end_early_and_are_repacked(kind, monkeypatch):
    """The share of branches left at which the others' buffers are copied changes no token."""
    model = tiny(kind)
    ids, mask = ragged()
    windows = {}
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(decode, "REPACK", share)
        windows[share] = greedy(model, model, ids, mask, eos_token_id=list(range(8)))
    lengths = windows[0.0].student_lengths
    assert 1 <= lengths.min() < lengths.max()
    assert all(torch.equal(each.student_tokens, windows[0.0].student_tokens) for each in windows.values())
    assert all(torch.equal(each.student_lengths, lengths) for each in windows.values())


def test_no_end_of_sequence_token_gives_full_windows():
    model = tiny("qwen3")
    ids, mask = ragged()
    windows = greedy(model, model, ids, mask, eos_token_id=None)
    assert (windows.student_lengths == HORIZON).all()
    assert_windows(model, ids, mask, POSITIONS, windows.student_tokens, windows.student_lengths, ends=None)


@pytest.mark.parametrize("given", [11, [11, 12], None])
def test_the_end_of_sequence_token_is_given_or_the_students(given):
    student, teacher = tiny("llama"), tiny("llama", seed=5)
    ids, mask = ragged()
    free = greedy(student, teacher, ids, mask, eos_token_id=None)
    end = int(free.student_tokens[0, 3])
    given = given if given is None else [end, *([given] if isinstance(given, int) else given)]
    student.generation_config.eos_token_id = end
    teacher.generation_config.eos_token_id = VOCAB - 1
    windows = greedy(student, teacher, ids, mask, eos_token_id=given)
    assert windows.student_lengths[0] == free.student_tokens[0].tolist().index(end) + 1
    assert windows.student_tokens[0, windows.student_lengths[0] - 1] == end
    assert (windows.student_tokens[0, windows.student_lengths[0] :] == 0).all()


def test_a_model_that_cannot_branch_falls_back_and_says_so():
    student, teacher = bloom(), tiny("llama")
    ids, mask = ragged()
    windows = greedy(student, teacher, ids, mask)
    assert windows.student_way == "generate: its forward takes no position_ids"
    assert windows.teacher_way == "branches"
    assert_windows(student, ids, mask, POSITIONS, windows.student_tokens, windows.student_lengths)


def test_generate_follows_the_model_whatever_its_generation_config_says():
    """As branching does: suppressed tokens, penalties and a least length are no part of the distribution that a loss sees."""
    student, teacher = bloom(), tiny("llama")
    ids, mask = ragged()
    expected = topd.sample_windows(student, teacher, ids, mask, POSITIONS, horizon=HORIZON, temperature=0.0, eos_token_id=ENDS)
    drawn = expected.student_tokens[:, 0].unique().tolist()
    own = {"suppress_tokens": drawn, "repetition_penalty": 3.0, "min_new_tokens": HORIZON, "top_k": 2, "num_beams": 2}
    for name, value in own.items():
        setattr(student.generation_config, name, value)
    windows = topd.sample_windows(student, teacher, ids, mask, POSITIONS, horizon=HORIZON, temperature=0.0, eos_token_id=ENDS)
    assert torch.equal(windows.student_tokens, expected.student_tokens)
    assert torch.equal(windows.student_lengths, expected.student_lengths)
    assert student.generation_config.suppress_tokens == drawn


def test_both_ways_give_the_same_windows():
    model = tiny("qwen3")
    ids, mask = ragged()
    decoder, (_, attended) = decoder_of(model), check_rollouts(ids, mask)
    greedy = Sampling(HORIZON, temperature=0.0, generator=None, ends=ENDS, vocab=VOCAB)
    branched = continue_from(decoder, ids, attended, POSITIONS, greedy)
    object.__setattr__(decoder, "obstacle", "as if")
    batched = continue_from(decoder, ids, attended, POSITIONS, greedy)
    assert (branched.way, batched.way) == ("branches", "generate: as if")
    assert torch.equal(branched.tokens, batched.tokens)
    assert torch.equal(branched.lengths, batched.lengths)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary"),
        ({"attn_implementation": "flex_attention"}, "flex_attention"),
    ],
)
def test_what_branching_could_get_wrong_is_not_branched(options, reason):
    assert reason in decoder_of(tiny("llama", **options)).obstacle


@pytest.mark.parametrize("way", ["branches", "generate"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_windows_follow_the_models_distribution(way, temperature):
    """Pairs of tokens from one prefix, 4,000 windows, against the model's own probabilities of all pairs (p > 1e-4)."""
    model = tiny("llama", vocab_size=5, initializer_range=0.08)
    ids, positions = torch.tensor([[1, 4, 2, 0, 3]]), torch.tensor([[0, 3]]).expand(4000, 2)
    decoder = decoder_of(model)
    if way == "generate":
        object.__setattr__(decoder, "obstacle", "as if")
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(2, temperature, generator, ends=[], vocab=5)
    tokens = continue_from(decoder, ids, torch.ones(1, 5, dtype=torch.bool), positions, sampling).tokens
    counts = (tokens[:, 0] * 5 + tokens[:, 1]).bincount(minlength=25).double()
    with torch.no_grad():
        both = torch.cat([ids[:, :3].expand(5, 3), torch.arange(5).unsqueeze(1)], dim=1)
        logprobs = (model(both).logits.double() / temperature).log_softmax(-1)
    expected = 4000 * (logprobs[0, 2].unsqueeze(1) + logprobs[:, 3]).exp().reshape(-1)
    assert expected.min() > 5
    statistic = ((counts - expected).square() / expected).sum().item()
    assert chi2.sf(statistic, df=24) > 1e-4


@pytest.mark.parametrize("kind", ["llama", "llama_eager"])
def test_the_same_generator_gives_the_same_windows(kind):
    student, teacher = tiny(kind), tiny("qwen3", seed=5)
    ids, mask = ragged()

    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return greedy(student, teacher, ids, mask, temperature=1.0, generator=generator)

    first, again, other = sampled(7), sampled(7), sampled(8)
    assert torch.equal(first.student_tokens, again.student_tokens)
    assert torch.equal(first.teacher_tokens, again.teacher_tokens)
    assert not torch.equal(first.teacher_tokens, other.teacher_tokens)


def test_rollout_windows_are_the_rollouts_own_tokens():
    """Up to the last attended column; nothing is generated for the student."""
    model = tiny("llama")
    ids, mask = ragged()
    windows = greedy(model, model, ids, mask, student_window="rollout")
    assert windows.student_way == "rollout"
    ends = {0: 20, 1: 15, 2: 18}
    for (row, column), window, length in zip(POSITIONS.tolist(), windows.student_tokens, windows.student_lengths, strict=True):
        expected = ids[row, column : min(column + HORIZON, ends[row])].tolist()
        assert window.tolist() == expected + [0] * (HORIZON - len(expected))
        assert length == len(expected)


def test_a_teacher_with_more_tokens_draws_from_the_common_ones():
    student, teacher = tiny("llama"), tiny("llama", seed=5, vocab_size=VOCAB + 400)
    ids, mask = ragged()
    windows = greedy(student, teacher, ids, mask, temperature=1.0, eos_token_id=None)
    assert windows.teacher_tokens.max() < VOCAB
    assert greedy(teacher, student, ids, mask, temperature=1.0, eos_token_id=None).student_tokens.max() >= VOCAB


def test_no_position_gives_no_windows():
    model = tiny("llama")
    ids, mask = ragged()
    windows = greedy(model, model, ids, mask, POSITIONS[:0])
    assert windows.student_tokens.shape == windows.teacher_tokens.shape == (0, HORIZON)
    assert windows.student_lengths.shape == (0,)


def test_the_models_are_left_as_they_were():
    """Modes, flags, configuration and parameters; checkpointed layers in training too."""
    model = tiny("llama").train()
    checkpoint_activations(model)
    ids, mask = ragged()
    before = [part.training for part in model.modules()], model.config.to_dict(), [p.clone() for p in model.parameters()]
    windows = greedy(model, model, ids, mask)
    assert [part.training for part in model.modules()] == before[0]
    assert model.config.to_dict() == before[1]
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), before[2], strict=True))
    assert_windows(model.eval(), ids, mask, POSITIONS, windows.student_tokens, windows.student_lengths)


def test_autocast_and_half_precision_run():
    ids, mask = ragged()
    model = tiny("llama").to(torch.bfloat16)
    assert (greedy(model, model, ids, mask).student_lengths >= 1).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (greedy(tiny("gemma3_sliding"), tiny("llama"), ids, mask).student_lengths >= 1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(3, 20)}, TypeError, "input_ids must be torch.int64"),
        ({"input_ids": torch.zeros(20, dtype=torch.int64)}, ValueError, r"input_ids must be \[B, T\]"),
        ({"attention_mask": torch.ones(3, 19)}, TypeError, "attention_mask must be bool or integers"),
        ({"attention_mask": torch.ones(3, 19, dtype=torch.bool)}, ValueError, "attention_mask must have shape"),
        ({"attention_mask": torch.full((3, 20), 2)}, ValueError, "attention_mask must hold 0 and 1 alone, got 2"),
        ({"positions": torch.tensor([[0, 0]])}, ValueError, "from column 1 on, got"),
        ({"positions": torch.tensor([[3, 5]])}, ValueError, "positions must lie in input_ids"),
        ({"positions": torch.tensor([[0, 4]])}, ValueError, "positions must be attended, and the column before"),
        ({"positions": torch.tensor([[1, 15]])}, ValueError, "positions must be attended"),
        ({"positions": torch.tensor([5])}, ValueError, r"positions must be \[m, 2\]"),
        ({"horizon": 0}, ValueError, "horizon must be > 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0, got -1.0"),
        ({"student_window": "both"}, ValueError, "student_window must be one of 'regenerate', 'rollout', got 'both'"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an int, a list of ints or None"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id must be >= 0 and an id, got -1"),
        ({"eos_token_id": [2, 2**70]}, ValueError, "eos_token_id must be >= 0 and an id, got 1180591620717411303424"),
        ({"student_model": torch.nn.Linear(2, 2)}, TypeError, "must be a transformers causal language model"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    model = tiny("llama")
    ids, mask = ragged()
    given = {"student_model": model, "teacher_model": model, "input_ids": ids, "attention_mask": mask, "positions": POSITIONS}
    with pytest.raises(error, match=message):
        topd.sample_windows(**(given | change))


@pytest.mark.slow
@needs_model
def test_smollm2_greedy_windows_equal_generate():
    """And its hidden states from the cache equal those of a forward of prefix and window."""
    model = smollm2_cases.model()
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(49152, (2, 40), generator=generator), torch.ones(2, 40, dtype=torch.bool)
    mask[1, :6] = False
    positions = torch.tensor([[0, 5], [1, 20], [0, 39]])
    windows = topd.sample_windows(model, model, ids, mask, positions, horizon=12, temperature=0, student_window="rollout")
    assert_windows(model, ids, mask, positions, windows.teacher_tokens, windows.teacher_lengths, ends=[2], horizon=12)
    with torch.no_grad():
        _, states = topd.window_hidden(model, ids, mask, windows)
        for index, position in enumerate(positions):
            length = int(windows.student_lengths[index])
            whole = torch.cat([prefix(ids, mask, position), windows.student_tokens[index : index + 1, :length]], dim=1)
            expected = model.model(whole).last_hidden_state[0, -length - 1 : -1]
            assert_near(states[index, :length], expected.double(), 1e-5)
    assert math.isfinite(states.sum().item())


@pytest.mark.parametrize("vocab", [5, 1024, 2048, 2050, 5000])
def test_the_most_likely_token_is_the_first_of_equals(vocab):
    scores = torch.randint(-3, 4, (7, vocab)).float()
    scores[0, -1], scores[1] = 9.0, 0.0
    scores[2], scores[3, vocab // 2] = -torch.inf, torch.nan
    assert torch.equal(most_likely(scores), scores.argmax(-1))
    by_column = scores.t().contiguous().t()
    assert torch.equal(most_likely(by_column), scores.argmax(-1))
