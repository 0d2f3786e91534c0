"""topd.branching.noise: the numbers themselves, the keys of points, and each model's distribution kept over 10^5 draws."""

import math

import pytest
import torch
from scipy.stats import chi2
from tiny_models import ragged, tiny

import topd
from topd.branching.noise import ENTRIES, STEP, Followed, Noise, exponentials, mixed, point_keys

DRAWS = 100_000
WORD = (1 << 64) - 1


def splitmix(state):
    """Return splitmix64's number for a state, in Python's integers."""
    bits = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & WORD
    return bits ^ (bits >> 31)


def test_the_bits_are_splitmix64s(device):
    """The first two numbers of seed 1234567, as they are published, and others by Python's integers, on every device."""
    states = 1234567 + torch.arange(1, 3, device=device) * STEP
    assert [each & WORD for each in mixed(states).tolist()] == [6457827717110365317, 3203168211198807973]
    keys = torch.tensor([[0], [1], [-5], [2**63 - 1], [-(2**63)]], device=device)
    counters = torch.arange(4, device=device)
    bits = [[splitmix((key + n * (STEP & WORD)) & WORD) for n in range(4)] for (key,) in keys.tolist()]
    assert [[each & WORD for each in row] for row in mixed(keys + counters * STEP).tolist()] == bits
    expected = torch.tensor([[-math.log(((each >> 12) + 0.5) / 2**52) for each in row] for row in bits]).double()
    assert (exponentials(keys, counters).cpu() - expected).abs().max() < 1e-5
    assert torch.equal(states, 1234567 + torch.arange(1, 3, device=device) * STEP)


def test_the_noise_has_no_extremes():
    """Of the smallest and the largest 52 bits: no logarithm of 0 and no 0."""
    for bits in (0, (1 << 52) - 1):
        uniform = torch.tensor(bits).double().add_(0.5).mul_(2.0**-52)
        assert 0 < uniform < 1
        assert 0 < -uniform.log() < 37


def test_noise_of_a_million_tokens_is_exponential():
    noise = exponentials(mixed(torch.arange(20)).unsqueeze(-1), torch.arange(50_000))
    assert abs(noise.mean().item() - 1) < 5e-3
    assert abs(noise.var().item() - 1) < 1e-2
    assert abs((noise < math.log(2)).double().mean().item() - 0.5) < 2.5e-3
    centred = noise - noise.mean()
    for near in ((centred[:, 1:] * centred[:, :-1]), (centred[1:] * centred[:-1])):
        assert abs(near.mean().item()) < 5e-3


def test_a_points_key_is_of_what_its_row_says():
    """Padding, the order of rows and of points, and other rows do not count; another token, place or seed does."""
    ids, mask = ragged()
    attended, seed = mask.bool(), torch.tensor(12)
    positions = torch.tensor([[0, 5], [1, 3], [2, 9], [1, 7]])
    keys = point_keys(seed, ids, attended, positions)
    assert keys.unique().numel() == 4
    rows, points = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    place = rows.argsort()
    moved = torch.stack([place[positions[points, 0]], positions[points, 1]], dim=1)
    assert torch.equal(point_keys(seed, ids[rows], attended[rows], moved), keys[points])
    trimmed = point_keys(seed, ids[:1, 4:], attended[:1, 4:], positions[:1] - torch.tensor([0, 4]))
    assert torch.equal(trimmed, keys[:1])
    other = ids.clone()
    other[:, 12] += 1
    assert (point_keys(seed, other, attended, positions) != keys).all()
    assert (point_keys(seed + 1, ids, attended, positions) != keys).all()


def test_points_that_are_the_same_are_told_apart_by_their_number():
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.ones(2, 3, dtype=torch.bool)
    positions = torch.tensor([[0, 1], [1, 1], [0, 2], [0, 1]])
    keys = point_keys(torch.tensor(3), ids, mask, positions)
    assert keys.unique().numel() == 4
    assert torch.equal(point_keys(torch.tensor(3), ids[:1], mask[:1], positions[[0, 2]]), keys[[0, 2]])
    assert point_keys(torch.tensor(3), ids, mask, positions[:0]).shape == (0,)


def followed(student, logits, tokens, temperature=1.0):
    """Return what one step follows: m rows in which the student's logits are given, and the tokens that they led to."""
    m = tokens.numel()

    class Given:
        def logits(self, states, vocab):
            return logits[:, :vocab]

    one = torch.ones(m, dtype=torch.int64)
    positions = torch.stack([torch.arange(m), one], dim=1)
    return Followed(Given(), torch.zeros(m, 1, 2), positions, 0 * one.unsqueeze(1), tokens.unsqueeze(1), one, temperature)


def test_noise_given_a_token_is_the_truncated_gumbels():
    """By the formulas of the sources, from the same uniform numbers; a token of probability 0 keeps its own noise."""
    student = torch.tensor([0.3, -torch.inf, -1.2, 2.0, 0.1]).double().log_softmax(-1)
    points, chosen = torch.arange(3) + 77, torch.tensor([0, 2, 3])
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    noise = Noise(points, followed(None, student.expand(3, 5), chosen))
    drawn = noise.choose(teacher, torch.arange(3), 0)
    for window, y in enumerate(chosen.tolist()):
        key = mixed(points[window : window + 1])
        gumbel = -exponentials(key, torch.arange(1, 6)).log()
        z = -exponentials(key, torch.zeros(1, dtype=torch.int64)).log()
        posterior = -(torch.exp(-z) + torch.exp(-(student + gumbel))).log()
        posterior[y] = z
        shift = torch.where(student.isfinite(), posterior - student, gumbel)
        assert drawn[window] == (teacher[window] + shift).argmax()
        repeated = Noise(points, followed(None, student.expand(3, 5), chosen)).choose(student.expand(3, 5), torch.arange(3), 0)
        assert torch.equal(repeated, chosen)


def test_a_token_that_the_student_could_not_say_gives_no_nan():
    student = torch.tensor([[0.0, -torch.inf, -2000.0]]).expand(2, 3)
    noise = Noise(torch.arange(2), followed(None, student, torch.tensor([1, 2])))
    assert noise.choose(torch.tensor([[0.0, 1.0, -torch.inf]]).expand(2, 3), torch.arange(2), 0).tolist()[0] == 1


def test_windows_and_vocabularies_in_parts_have_the_same_noise(monkeypatch):
    logits = torch.randn(9, 301, generator=torch.Generator().manual_seed(1))
    noise = Noise(mixed(torch.arange(20)), None)
    windows = torch.randperm(20)[:9]
    whole = noise.choose(logits, windows, 4)
    wider = torch.cat([logits, torch.full((9, 50), -torch.inf)], dim=1)
    assert torch.equal(noise.choose(wider, windows, 4), whole)
    assert torch.equal(noise.choose(logits.t().contiguous().t(), windows, 4), whole)
    assert torch.equal(torch.cat([noise.choose(logits[i : i + 1], windows[i : i + 1], 4) for i in range(9)]), whole)
    assert not torch.equal(noise.choose(logits, windows, 5), whole)
    assert ENTRIES >= 1 << 20
    for entries in (1, 700):
        monkeypatch.setattr("topd.branching.noise.ENTRIES", entries)
        assert torch.equal(noise.choose(logits, windows, 4), whole)


def pairs_of(model, prefix, temperature):
    """Return the probabilities of the next two tokens, [V, V] float64."""
    vocab, n = model.config.vocab_size, prefix.numel()
    both = torch.cat([prefix.expand(vocab, n), torch.arange(vocab).unsqueeze(1)], dim=1)
    with torch.no_grad():
        logprobs = (model(both).logits.double() / temperature).log_softmax(-1)
    return (logprobs[0, n - 1].unsqueeze(1) + logprobs[:, n]).exp()


def chance(tokens, pairs):
    """Return the chance of these pairs of tokens [m, 2], or of worse ones, under their probabilities (Pearson's test)."""
    vocab = pairs.shape[0]
    counts = (tokens[:, 0] * vocab + tokens[:, 1]).bincount(minlength=vocab**2).double()
    expected = len(tokens) * pairs.reshape(-1)
    assert expected.min() > 5
    return chi2.sf(((counts - expected).square() / expected).sum().item(), df=vocab**2 - 1)


@pytest.mark.parametrize(("noise", "temperature"), [("shared", 1.0), ("counterfactual", 0.7)])
def test_each_model_keeps_its_distribution(noise, temperature):
    """Pairs of tokens, 10^5 windows (p > 1e-4): of shared noise those of both models from one prefix, of noise given the
    rollout the teacher's, over rollouts of the student's. The second tokens count windows that have left the rollout."""
    student, teacher = (tiny("llama", seed=seed, vocab_size=5, num_hidden_layers=1, initializer_range=0.12) for seed in (0, 5))
    prefix, generator = torch.tensor([1, 4]), torch.Generator().manual_seed(3)
    expected = [pairs_of(model, prefix, temperature) for model in (student, teacher)]
    options = {"horizon": 2, "temperature": temperature, "generator": generator, "eos_token_id": []}
    if noise == "shared":
        ids, positions = torch.tensor([[1, 4, 0, 3]]), torch.tensor([[0, 2]]).expand(DRAWS, 2)
    else:
        sampled = expected[0].reshape(-1).multinomial(DRAWS, replacement=True, generator=generator)
        ids = torch.cat([prefix.expand(DRAWS, 2), torch.stack([sampled // 5, sampled % 5], dim=1)], dim=1)
        positions = torch.stack([torch.arange(DRAWS), torch.full((DRAWS,), 2)], dim=1)
        options["student_window"] = "rollout"
    windows = topd.sample_windows(student, teacher, ids, torch.ones_like(ids), positions, window_noise=noise, **options)
    assert chance(windows.student_tokens, expected[0]) > 1e-4
    assert chance(windows.teacher_tokens, expected[1]) > 1e-4
    same = (windows.student_tokens == windows.teacher_tokens).all(-1).double().mean()
    assert 3 * (expected[0] * expected[1]).sum() < same < 1
