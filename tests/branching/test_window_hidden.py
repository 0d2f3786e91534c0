"""topd.window_hidden: equal to a forward of every prefix with its window, in value and gradient, also through the prefix."""

import pytest
import torch
from compare import assert_near
from tiny_models import KINDS, POSITIONS, bloom, checkpoint_activations, flat_gradient, prefix, ragged, tiny

import topd
from topd.branching import replay

HORIZON = 7
MILD = {"initializer_range": 0.2}  # so that float32 itself is good for 1e-5


def windows_of(model, ids, mask, **options):
    settings = {"horizon": HORIZON, "temperature": 0, "eos_token_id": list(range(15))} | options
    return topd.sample_windows(model, model, ids, mask, POSITIONS, **settings)


def upstream(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def separate_forwards(model, ids, mask, windows):
    """Each prefix with its window alone, and each rollout alone; 0 where nothing is due."""
    width, base = model.config.hidden_size, model.model if model.base_model is model else model.base_model
    states = torch.zeros(*windows.student_tokens.shape, width)
    for index, position in enumerate(windows.positions):
        length = int(windows.student_lengths[index])
        whole = torch.cat([prefix(ids, mask, position), windows.student_tokens[index : index + 1, :length]], dim=1)
        of_window = base(whole).last_hidden_state[0, -length - 1 : -1]
        states = states.index_put((torch.full((length,), index), torch.arange(length)), of_window)
    rollouts = torch.zeros(*ids.shape, width)
    for row in range(ids.shape[0]):
        columns = mask[row].nonzero()[:, 0]
        of_rollout = base(ids[row, columns].unsqueeze(0)).last_hidden_state[0]
        rollouts = rollouts.index_put((torch.full_like(columns, row), columns), of_rollout)
    return rollouts, states


def loss_of(rollouts, states, mask):
    weighted = (rollouts * upstream(rollouts.shape, 1))[mask > 0]
    return weighted.sum() + (states * upstream(states.shape, 2)).sum()


def assert_equal_to_separate_forwards(model, windows, ids, mask, tolerance=1e-5):
    model.zero_grad()
    rollouts, states = topd.window_hidden(model, ids, mask, windows)
    loss_of(rollouts, states, mask).backward()
    gradient = flat_gradient(model)
    model.zero_grad()
    true_rollouts, true_states = separate_forwards(model, ids, mask, windows)
    loss_of(true_rollouts, true_states, mask).backward()
    assert_near(states.detach(), true_states.detach().double(), tolerance, "window_hidden")
    assert_near(rollouts[mask > 0].detach(), true_rollouts[mask > 0].detach().double(), tolerance, "rollout_hidden")
    assert_near(gradient, flat_gradient(model).double(), tolerance, "gradient")
    past = torch.arange(states.shape[1]) >= windows.student_lengths.unsqueeze(1)
    assert (states[past] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_separate_forwards_in_value_and_gradient(kind):
    model = tiny(kind, **MILD)
    ids, mask = ragged()
    windows = windows_of(model, ids, mask)
    assert windows.student_lengths.min() < HORIZON
    assert_equal_to_separate_forwards(model, windows, ids, mask)


def test_the_gradient_reaches_the_prefix_through_the_cache():
    """A window's last state depends on the embedding of the rollout's first token, which no window holds."""
    model = tiny("llama", **MILD)
    ids, mask = ragged()
    ids[0, 4] = 60
    ids[ids == 60] = 59
    ids[0, 4] = 60
    windows = windows_of(model, ids, mask, student_window="rollout")
    _, states = topd.window_hidden(model, ids, mask, windows)
    states[3].square().sum().backward()
    assert windows.positions[3].tolist() == [0, 19]
    assert model.model.embed_tokens.weight.grad[60].abs().max() > 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_sliding"])
def test_gradient_checkpointing_gives_the_same_states_and_gradients(kind):
    """Gradient checkpointing forbids the cache: windows go through one forward with their rollouts."""
    model = tiny(kind, **MILD)
    ids, mask = ragged()
    windows = windows_of(model, ids, mask)
    model.train()
    checkpoint_activations(model)
    assert_equal_to_separate_forwards(model, windows, ids, mask)


def test_a_model_that_cannot_branch_goes_over_every_prefix():
    model = bloom()
    ids, mask = ragged()
    assert_equal_to_separate_forwards(model, windows_of(model, ids, mask), ids, mask)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tokens", "entries"), [(1, 1 << 25), (15, 1 << 25), (1024, 1), (1024, 800)])
def test_groups_change_nothing(tokens, entries, checkpointing, monkeypatch):
    model = tiny("llama", **MILD)
    ids, mask = ragged()
    windows = windows_of(model, ids, mask)
    monkeypatch.setattr(replay, "GROUP_TOKENS", tokens)
    monkeypatch.setattr(replay, "GROUP_ENTRIES", entries)
    if checkpointing:
        model.train()
        checkpoint_activations(model)
    assert_equal_to_separate_forwards(model, windows, ids, mask)


def test_windows_of_one_token_need_no_forward_of_their_own():
    model = tiny("llama", **MILD)
    ids, mask = ragged()
    windows = windows_of(model, ids, mask, horizon=1)
    assert_equal_to_separate_forwards(model, windows, ids, mask)


def test_float64_is_equal_to_rounding():
    model = tiny("qwen3").double()
    ids, mask = ragged()
    windows = windows_of(model, ids, mask)
    rollouts, states = topd.window_hidden(model, ids, mask, windows)
    with torch.no_grad():
        true_rollouts, true_states = separate_forwards_in_double(model, ids, mask, windows)
    assert_near(states.detach(), true_states, 1e-13)
    assert_near(rollouts[mask > 0].detach(), true_rollouts[mask > 0], 1e-13)


def separate_forwards_in_double(model, ids, mask, windows):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return separate_forwards(model, ids, mask, windows)
    finally:
        torch.set_default_dtype(default)


def test_without_gradients_and_without_windows():
    model = tiny("llama", **MILD)
    ids, mask = ragged()
    windows = topd.sample_windows(model, model, ids, mask, POSITIONS[:0], horizon=HORIZON)
    with torch.no_grad():
        rollouts, states = topd.window_hidden(model, ids, mask, windows)
    assert states.shape == (0, HORIZON, 32)
    assert rollouts.shape == (3, 20, 32)
    assert not rollouts.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_tokens": torch.zeros(2, 3, dtype=torch.int64)}, r"windows.student_tokens must be \[9, K\]"),
        ({"student_lengths": torch.zeros(9, dtype=torch.int64)}, r"windows.student_lengths must lie in \[1, 7\]"),
        ({"student_lengths": torch.ones(8, dtype=torch.int64)}, "windows.student_lengths must have shape"),
        ({"positions": POSITIONS + 20}, "positions must lie in input_ids"),
    ],
)
def test_bad_windows_are_refused(change, message):
    model = tiny("llama", **MILD)
    ids, mask = ragged()
    windows = windows_of(model, ids, mask)
    fields = ("positions", "student_tokens", "teacher_tokens", "student_lengths", "teacher_lengths")
    bad = topd.Windows(**({name: getattr(windows, name) for name in fields} | change))
    with pytest.raises(ValueError, match=message):
        topd.window_hidden(model, ids, mask, bad)
    with pytest.raises(TypeError, match=r"windows must be a topd\.Windows, got dict"):
        topd.window_hidden(model, ids, mask, change)
