"""topd.sample_windows with window_noise: equal models say the same, in every batch; a step by step computation agrees."""

import copy

import pytest
import torch
from memory_watch import Largest
from tiny_models import ENDS, POSITIONS, VOCAB, bloom, prefix, ragged, tiny

import topd
from topd.branching.noise import exponentials, mixed, point_keys
from topd.models import decoder as decoders

HORIZON = 9
KINDS = {"shared": "regenerate", "counterfactual": "rollout"}
each_noise = pytest.mark.parametrize("noise", KINDS)


def sampled(student, teacher, ids, mask, positions=POSITIONS, *, noise, seed=7, **options):
    settings = {"horizon": HORIZON, "temperature": 0.8, "eos_token_id": ENDS, "student_window": KINDS.get(noise, "regenerate")}
    settings |= {"generator": torch.Generator().manual_seed(seed), "window_noise": noise}
    return topd.sample_windows(student, teacher, ids, mask, positions, **(settings | options))


def tokens_of(windows):
    return [windows.student_tokens, windows.teacher_tokens, windows.student_lengths, windows.teacher_lengths]


def assert_same(first, second):
    for one, other in zip(tokens_of(first), tokens_of(second), strict=True):
        assert torch.equal(one, other)


@each_noise
@pytest.mark.parametrize("kind", ["llama", "llama_eager", "gemma3_sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_give_equal_windows(noise, kind, dtype):
    """At distance 0, in bfloat16 too, where a step rounds otherwise than the pass over the rollout."""
    student = tiny(kind).to(dtype)
    ids, mask = ragged()
    for ends in ([], ENDS):
        windows = sampled(student, copy.deepcopy(student), ids, mask, noise=noise, eos_token_id=ends)
        lengths = windows.student_lengths
        if noise == "counterfactual":  # a teacher ends at an end token in the middle of the rollout, too
            stops = torch.isin(windows.student_tokens, torch.tensor(ends, dtype=torch.int64))
            stops &= torch.arange(HORIZON) < lengths.unsqueeze(-1)
            lengths = torch.where(stops.any(-1), stops.byte().argmax(-1) + 1, lengths)
        assert torch.equal(windows.teacher_lengths, lengths)
        counted = torch.arange(HORIZON) < lengths.unsqueeze(-1)
        assert torch.equal(windows.teacher_tokens, windows.student_tokens.masked_fill(~counted, 0))
        both = {"student_lengths": lengths, "teacher_lengths": lengths, "solver": "exact", "cost": "mismatch"}
        table = student.get_input_embeddings().weight.float().detach()
        assert topd.near_future_divergence(windows.student_tokens, windows.teacher_tokens, table, **both).distance.eq(0).all()


@each_noise
def test_models_that_differ_share_more_than_by_chance(noise):
    student, teacher = tiny("llama", initializer_range=0.2), tiny("llama", initializer_range=0.2)
    teacher.lm_head.weight.data += 0.02 * torch.randn_like(teacher.lm_head.weight)
    ids, mask = ragged()
    if noise == "counterfactual":
        ids = torch.where(mask > 0, student.generate(ids[:, :1], max_new_tokens=19, do_sample=True, pad_token_id=0), ids)
    same = {}
    for each in (noise, "independent"):
        windows = sampled(
            student, teacher, ids, mask, noise=each, temperature=1.0, student_window=KINDS[noise], eos_token_id=[]
        )
        same[each] = (windows.student_tokens == windows.teacher_tokens)[:, :4].double().mean()
        assert not torch.equal(windows.student_tokens, windows.teacher_tokens)
    assert same[noise] > 0.5 > same["independent"]


@each_noise
@pytest.mark.parametrize("kind", ["llama", "llama_eager"])
def test_the_batch_changes_no_window(noise, kind):
    """Rows and points in another order, a batch in two parts, other padding: the same seed gives the same windows."""
    student, teacher = tiny(kind), tiny("qwen3", seed=5)
    ids, mask = ragged()
    whole = sampled(student, teacher, ids, mask, noise=noise)
    rows, points = torch.tensor([2, 0, 1]), torch.randperm(len(POSITIONS))
    moved = torch.stack([rows.argsort()[POSITIONS[:, 0]], POSITIONS[:, 1]], dim=1)[points]
    shuffled = sampled(student, teacher, ids[rows], mask[rows], moved, noise=noise)
    for one, other in zip(tokens_of(whole), tokens_of(shuffled), strict=True):
        assert torch.equal(one[points], other)
    for part in (slice(0, 1), slice(1, 3)):
        chosen = ((part.start <= POSITIONS[:, 0]) & (part.stop > POSITIONS[:, 0])).nonzero()[:, 0]
        own = POSITIONS[chosen] - torch.tensor([part.start, 0])
        trimmed = 4 if part.start == 0 else 0
        own[:, 1] -= trimmed
        windows = sampled(student, teacher, ids[part, trimmed:], mask[part, trimmed:], own, noise=noise)
        for one, other in zip(tokens_of(whole), tokens_of(windows), strict=True):
            assert torch.equal(one[chosen], other)
    with pytest.raises(AssertionError):
        assert_same(whole, sampled(student, teacher, ids, mask, noise=noise, seed=8))


@each_noise
def test_models_that_cannot_branch_have_the_same_noise(noise, monkeypatch):
    """By `generate`, in batches of its own: the windows of branching, token by token."""
    student, teacher = tiny("llama"), tiny("qwen3", seed=5, vocab_size=VOCAB + 9)
    ids, mask = ragged()
    branched = sampled(student, teacher, ids, mask, noise=noise)
    monkeypatch.setattr(decoders, "obstacle_of", lambda model, base: "as if")
    monkeypatch.setattr("topd.models.sampling.BATCH_TOKENS", 60)
    batched = sampled(student, teacher, ids, mask, noise=noise)
    assert batched.teacher_way == "generate: as if"
    assert_same(branched, batched)


@each_noise
def test_bloom_falls_back_and_repeats_itself(noise):
    ids, mask = ragged()
    windows = sampled(bloom(), bloom(), ids, mask, noise=noise, eos_token_id=[])
    assert windows.teacher_way == "generate: its forward takes no position_ids"
    assert torch.equal(windows.student_tokens, windows.teacher_tokens)
    assert torch.equal(windows.student_lengths, windows.teacher_lengths)


def one_by_one(model, ids, mask, key, position, student=None, temperature=0.8, ends=ENDS):
    """Return a window, one forward of its whole prefix a step, by the formulas; `student`: noise given the rollout."""
    said, (row, column) = prefix(ids, mask, position), position.tolist()
    rollout, before = ids[row, column:][mask[row, column:] > 0], said
    window, counters = [], torch.arange(1, VOCAB + 1)
    for step in range(HORIZON):
        keys = mixed(key.reshape(1) + step)
        noise = -exponentials(keys, counters).log()
        if student is not None:
            if step == len(rollout) and rollout[-1] not in ends:
                break
            if step < len(rollout):
                phi = (student(before).logits[0, -1, :VOCAB].double() / temperature).log_softmax(-1)
                top = -exponentials(keys, torch.zeros(1, dtype=torch.int64)).log()
                posterior = -(torch.exp(-top) + torch.exp(-(phi + noise))).log()
                posterior[rollout[step]] = top
                noise = posterior - phi
                before = torch.cat([before, rollout[step].reshape(1, 1)], dim=1)
        logprobs = (model(said).logits[0, -1, :VOCAB].double() / temperature).log_softmax(-1)
        window.append(int((logprobs + noise).argmax()))
        said = torch.cat([said, torch.tensor([[window[-1]]])], dim=1)
        if window[-1] in ends:
            break
    return window


@each_noise
def test_windows_equal_those_of_one_forward_a_step(noise):
    """Also past the rollout's end, behind an end token there, and where a window has left it: a step's noise stays its own."""
    student, teacher = tiny("llama"), tiny("qwen3", seed=5)
    ids, mask = ragged()
    ids[1, 14] = ENDS[0]
    windows = sampled(student, teacher, ids, mask, noise=noise, seed=2)
    seed = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(2))
    keys = point_keys(seed, ids, mask.bool(), POSITIONS)
    with torch.no_grad():
        for index, position in enumerate(POSITIONS):
            given = student if noise == "counterfactual" else None
            expected = one_by_one(teacher, ids, mask, keys[index], position, given)
            assert windows.teacher_tokens[index].tolist() == expected + [0] * (HORIZON - len(expected))
            assert windows.teacher_lengths[index] == len(expected)
            if noise == "shared":
                expected = one_by_one(student, ids, mask, keys[index], position)
                assert windows.student_tokens[index].tolist() == expected + [0] * (HORIZON - len(expected))
    if noise == "counterfactual":
        assert windows.teacher_lengths[6] > windows.student_lengths[6]  # behind the rollout's end token
        assert windows.teacher_lengths[3] == 1


@each_noise
def test_a_teacher_with_fewer_tokens_says_the_same_of_those_that_both_have(noise):
    student = tiny("llama", vocab_size=VOCAB + 30)
    teacher = tiny("llama")
    teacher.load_state_dict(
        {name: value[:VOCAB] if "lm_head" in name or "embed" in name else value for name, value in student.state_dict().items()}
    )
    ids, mask = ragged()
    for one, other in ((student, teacher), (teacher, student)):
        one.lm_head.weight.data[VOCAB:], other.lm_head.weight.data[VOCAB:] = 0, 0
        windows = sampled(one, other, ids, mask, noise=noise, eos_token_id=[])
        common = (windows.student_tokens < VOCAB).long().cumprod(-1).bool()
        assert common.double().mean() > 0.5
        assert torch.equal(windows.teacher_tokens[common], windows.student_tokens[common])


@each_noise
def test_no_position_and_no_row_give_no_windows(noise):
    model = tiny("llama")
    ids, mask = ragged()
    for rows in (slice(0, 3), slice(0, 0)):
        windows = sampled(model, model, ids[rows], mask[rows], POSITIONS[:0], noise=noise)
        assert windows.student_tokens.shape == windows.teacher_tokens.shape == (0, HORIZON)


def test_the_same_point_twice_has_two_windows():
    model = tiny("llama", initializer_range=0.1)
    ids, mask = ragged()
    windows = sampled(model, model, ids, mask, POSITIONS[[1, 1]], noise="shared", eos_token_id=[])
    assert not torch.equal(windows.teacher_tokens[0], windows.teacher_tokens[1])


@each_noise
def test_the_largest_tensor_is_one_step_of_noise(noise):
    """Float64 [m, V], never [m, K, V]."""
    vocab = 5000
    student, teacher = (tiny("llama", seed=seed, vocab_size=vocab) for seed in (0, 5))
    ids, mask = ragged()
    with Largest() as largest:
        sampled(student, teacher, ids, mask, POSITIONS.repeat(3, 1), noise=noise)
    assert largest.nbytes == 3 * len(POSITIONS) * vocab * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "common"}, "window_noise must be one of 'independent', 'shared', 'counterfactual', got 'common'"),
        (
            {"noise": "counterfactual", "student_window": "regenerate"},
            'window_noise "counterfactual" is drawn given what the student said in the rollout, got student_window="regenerate'
            '"; take student_window="rollout", or window_noise="shared"',
        ),
        (
            {"noise": "shared", "student_window": "rollout"},
            'window_noise "shared" is of windows that both models sample, got student_window="rollout"; take '
            'student_window="regenerate", or window_noise="counterfactual"',
        ),
        (
            {"noise": "shared", "temperature": 0},
            'window_noise "shared" needs temperature > 0, got 0, which is greedy and has no noise; take '
            'window_noise="independent"',
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        sampled(model, model, *ragged(), **options)
