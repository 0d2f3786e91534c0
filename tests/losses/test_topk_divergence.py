"""topd.topk_divergence: a KL with a teacher of whom k tokens a row are known."""

import math

import compare
import pytest
import torch
from compare import CONSTANT, Model, outcome_of, random_model
from topk_cases import (
    SUPPORTS,
    K,
    N,
    V,
    both_directions,
    by_topd,
    every_combination,
    from_probabilities,
    kl,
    random_teacher,
    truth,
)

import topd


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Student (1/2, 1/4, 1/8, 1/8); of the teacher tokens 1 and 3 are known, (5/8, 1/8). Tails 5/8 and 1/4; renormalised (2/3, 1/3)
# and (5/6, 1/6).
LITERALS = {
    ("forward", "raw"): 5 / 8 * math.log(5 / 2),
    ("reverse", "raw"): 1 / 4 * math.log(2 / 5),
    ("forward", "renormalised"): 5 / 6 * math.log(5 / 4) + 1 / 6 * math.log(1 / 2),
    ("reverse", "renormalised"): 2 / 3 * math.log(4 / 5) + 1 / 3 * math.log(2),
    ("forward", "tail"): 5 / 8 * math.log(5 / 2) + 1 / 4 * math.log(2 / 5),
    ("reverse", "tail"): 1 / 4 * math.log(2 / 5) + 5 / 8 * math.log(5 / 2),
}


@every_combination
def test_literal_values(direction, support, backend):
    """The second row holds the same teacher in the other order, behind padding."""
    head = topd.Head(f64([[4], [2], [1], [1]]).log())
    ids = torch.tensor([[1, 3, -100], [-100, 3, 1]])
    logprobs = f64([[5 / 8, 1 / 8, 0], [0, 1 / 8, 5 / 8]]).log()
    value = topd.topk_divergence(f64([[1], [1]]), head, ids, logprobs, direction=direction, support=support, backend=backend)
    torch.testing.assert_close(value, f64([LITERALS[direction, support]] * 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("support", "gradient"),
    [
        ("raw", [3 / 4 * 1 / 2, 3 / 4 * 1 / 4 - 5 / 8, 3 / 4 * 1 / 8, 3 / 4 * 1 / 8 - 1 / 8]),
        ("renormalised", [0, 2 / 3 - 5 / 6, 0, 1 / 3 - 1 / 6]),
        ("tail", [1 / 2 - 1 / 5, 1 / 4 - 5 / 8, 1 / 8 - 1 / 20, 0]),
    ],
)
def test_literal_gradients_of_the_forward_kl(support, gradient, backend):
    """To the logits: what the student has minus what it is asked for, the tail shared out as the student shares it."""
    weight = f64([[4], [2], [1], [1]]).log().requires_grad_()
    value = topd.topk_divergence(
        f64([[1]]), topd.Head(weight), torch.tensor([[1, 3]]), f64([[5 / 8, 1 / 8]]).log(), support=support, backend=backend
    )
    value.sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], f64(gradient), rtol=1e-12, atol=1e-15)


def test_the_defaults_are_forward_and_tail():
    model = random_model(N, V, 7)
    ids, logprobs = random_teacher(N, K)
    value = topd.topk_divergence(model.hidden, model.head(), ids, logprobs)
    compare.assert_near(value, from_probabilities(model, ids, logprobs, direction="forward", support="tail"), 1e-11)


HEADS = {
    "plain": ({}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "everything": ({"bias": True, "rank": 3, "softcap": 8.0, "scale": -0.8}, {"temperature": 1.6}),
}


@pytest.mark.parametrize(("model", "options"), HEADS.values(), ids=HEADS.keys())
@every_combination
def test_float64_value_and_gradients(direction, support, model, options, backend, device):
    """The temperature is the student's alone."""
    model = random_model(N, V, 7, **model).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(N, K))
    options = options | {"direction": direction, "support": support}
    outcome = by_topd(model, ids, logprobs, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, **options), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_combination
def test_no_worse_than_eager_at_the_dtype(direction, support, dtype, backend, device):
    model = random_model(64, 300, 7, bias=True).to(device).to(dtype)
    ids, logprobs = (part.to(device) for part in random_teacher(64, K, vocab=300))
    options = {"direction": direction, "support": support}
    outcome, true = by_topd(model, ids, logprobs, backend=backend, **options), truth(model, ids, logprobs, **options)
    yardstick = truth(model, ids, logprobs, dtype=None, **options)
    assert outcome.value.dtype == torch.float32
    compare.assert_no_worse(outcome.value, yardstick.value, true.value, CONSTANT, "value")
    for name, gradient in true.grads.items():
        compare.assert_no_worse(outcome.grads[name], yardstick.grads[name], gradient, CONSTANT, f"gradient of {name}")


@every_combination
def test_any_leading_shape_with_a_mask(direction, support, backend, device):
    model = random_model((3, 4), V, 7).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(3, 4, K))
    mask, options = torch.rand(3, 4, device=device) < 0.6, {"direction": direction, "support": support}
    outcome = by_topd(model, ids, logprobs, mask=mask, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, mask=mask, **options), 1e-11)
    one = topd.topk_divergence(model.hidden[1, 2], model.head(), ids[1, 2], logprobs[1, 2], backend=backend, **options)
    torch.testing.assert_close(one, from_probabilities(model, ids, logprobs, **options)[1, 2], rtol=1e-11, atol=1e-15)


@both_directions
@pytest.mark.parametrize("k", [V - 1, V])
def test_all_tokens_or_all_but_one_with_a_tail_are_the_full_divergence(k, direction, backend, device):
    """Beside the textbook sum, the first primitive."""
    model, teacher = random_model(N, V, 7).to(device), Model(torch.randn(N, 5).double(), torch.randn(V, 5).double()).to(device)
    full_t = teacher.logits().log_softmax(-1)
    logprobs, ids = full_t.topk(k, dim=-1)
    if k == V - 1:  # the one outside keeps some mass in every row
        ids = torch.rand(N, V, device=device).argsort(-1)[:, :k]
        logprobs = full_t.gather(-1, ids)

    def full(leaves: Model) -> torch.Tensor:
        p, q = full_t.exp(), leaves.logits().softmax(-1)
        return kl(p, q) if direction == "forward" else kl(q, p)

    outcome = by_topd(model, ids, logprobs, direction=direction, backend=backend)
    compare.assert_outcome(outcome, outcome_of(model, torch.float64, full), 1e-10)
    sides = model.hidden, model.head(), teacher.hidden, teacher.head()
    primitive = topd.linear_divergence(*sides, divergence=f"{direction}_kl", backend=backend)
    compare.assert_near(outcome.value, primitive, 1e-10, "value")


@every_combination
def test_k_is_the_vocabulary(direction, support, backend, device):
    """Nothing is outside: all three supports are one."""
    model = random_model(N, V, 7).to(device)
    logprobs, ids = torch.randn(N, V, dtype=torch.float64, device=device).log_softmax(-1).sort(-1)
    outcome = by_topd(model, ids, logprobs, direction=direction, support=support, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, direction=direction, support="raw"), 1e-11)


@both_directions
def test_a_tail_behind_padding_as_wide_as_the_vocabulary(direction, backend, device):
    """V columns, some of them padding: what is not named is in the tail."""
    model = random_model(N, V, 7).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(N, K))
    filler = torch.zeros(N, V - K, dtype=torch.float64, device=device)
    wide = torch.cat([ids, filler.long() - 100], -1), torch.cat([logprobs, filler - math.inf], -1)
    outcome = by_topd(model, *wide, direction=direction, support="tail", backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, direction=direction, support="tail"), 1e-11)


def test_a_student_that_is_its_own_offline_teacher(device):
    """Logits up to 100 and a sharp softmax, float32. Written by eager's log_softmax the targets are as far off as 3e-6."""
    model = Model(5 * torch.randn(2000, 16), torch.randn(1000, 16)).to(device)
    own = topd.topk_logprobs(model.hidden, model.head(), 20)
    value = topd.topk_divergence(model.hidden, model.head(), own.ids, own.logprobs)
    eager, ids = model.logits().log_softmax(-1).topk(20, dim=-1)
    assert topd.topk_divergence(model.hidden, model.head(), ids, eager).max() < 1e-5
    assert value.max() < 1e-5


@every_combination
@pytest.mark.parametrize("padding", [-100, -1, 3, V, 2**62])
def test_padding_contributes_nothing_with_any_id(padding, direction, support, backend, device):
    """3 is also a true token of each row; padding stands twice, with one id."""
    model = random_model(N, V, 7).to(device)
    ids = torch.tensor([[padding, 3, padding, 8]], device=device).expand(N, -1)
    logprobs = f64([[0, 0.25, 0, 0.5]]).log().to(device).expand(N, -1)
    options = {"direction": direction, "support": support}
    outcome = by_topd(model, ids, logprobs, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, ids[:, 1::2], logprobs[:, 1::2], **options), 1e-11)


@every_combination
def test_masked_rows_are_unchecked_and_exactly_zero(direction, support, backend, device):
    """Masked: NaN states; then NaN, too much mass, repeated ids, and ids that do not exist."""
    clean = random_model(6, V, 7).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(6, K))
    mask = torch.tensor([False, False, False, False, False, True], device=device)
    options = {"direction": direction, "support": support}
    true = truth(clean, ids, logprobs, mask=mask, **options)
    model = clean.map(lambda _, value: value.clone())
    model.hidden[0] = math.nan
    logprobs[1], logprobs[2] = math.nan, 3.0
    ids[3], ids[4] = 7, 10**9
    outcome = by_topd(model, ids, logprobs, mask=mask, backend=backend, **options)
    compare.assert_outcome(outcome, true, 1e-11)
    assert not outcome.value[:5].any()
    assert not outcome.grads["hidden"][:5].any()


@every_combination
def test_no_rows(direction, support, backend, device):
    model = random_model(0, V, 7).to(device)
    ids, logprobs = torch.zeros(0, 3, dtype=torch.int64, device=device), torch.zeros(0, 3, device=device)
    outcome = by_topd(model, ids, logprobs, direction=direction, support=support, backend=backend)
    assert outcome.value.shape == (0,)
    assert torch.equal(outcome.grads["weight"], torch.zeros_like(model.weight))


@every_combination
def test_a_row_of_padding_alone_is_zero(direction, support, backend, device):
    """Nothing is known of the teacher: with a tail both sides have one bucket of 1."""
    model = random_model(2, V, 7).to(device)
    ids, logprobs = torch.full((2, 3), -100, device=device), torch.full((2, 3), -math.inf, device=device)
    outcome = by_topd(model, ids, logprobs, direction=direction, support=support, backend=backend)
    torch.testing.assert_close(outcome.value, torch.zeros_like(outcome.value), rtol=0, atol=1e-15)
    torch.testing.assert_close(outcome.grads["weight"], torch.zeros_like(model.weight), rtol=0, atol=1e-15)


def test_a_teacher_without_a_tail_makes_the_reverse_kl_inf_without_nan_gradients(backend, device):
    """Row 0: all of the teacher's mass is known. Row 1 is an ordinary one."""
    model = random_model(2, V, 7, bias=True).to(device)
    ids, logprobs = torch.tensor([[4, 5], [4, 5]], device=device), f64([[0.5, 0.5], [0.5, 0.25]]).log().to(device)
    options = {"direction": "reverse", "support": "tail"}
    outcome = by_topd(model, ids, logprobs, backend=backend, **options)
    assert outcome.value[0] == math.inf
    compare.assert_near(outcome.value[1:], from_probabilities(model, ids, logprobs, **options)[1:], 1e-11)
    assert all(gradient.isfinite().all() for gradient in outcome.grads.values())
    assert not outcome.grads["hidden"][0].any()
    forward = topd.topk_divergence(model.hidden, model.head(), ids, logprobs, backend=backend)
    compare.assert_near(forward, from_probabilities(model, ids, logprobs, direction="forward", support="tail"), 1e-11)


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_token_that_the_student_excludes(support, backend, device):
    """Token 2 has a bias of -inf: the forward KL of row 1, which knows it, is inf without a gradient."""
    model = random_model(2, V, 7, bias=True).to(device)
    model.bias[2] = -math.inf
    ids, logprobs = torch.tensor([[4, 5], [2, 5]], device=device), f64([[0.5, 0.25]] * 2).log().to(device)
    forward = by_topd(model, ids, logprobs, direction="forward", support=support, backend=backend)
    assert forward.value.isinf().tolist() == [False, True]
    assert all(gradient.isfinite().all() for gradient in forward.grads.values())
    assert torch.equal(forward.grads["hidden"][1], torch.zeros(7, dtype=torch.float64, device=device))
    reverse = by_topd(model, ids, logprobs, direction="reverse", support=support, backend=backend)
    compare.assert_near(reverse.value, from_probabilities(model, ids, logprobs, direction="reverse", support=support), 1e-11)
    assert all(gradient.isfinite().all() for gradient in reverse.grads.values())


@every_combination
@pytest.mark.parametrize("hint", [[1.0, 0, 2, -1, 5], [0.0] * 5, [math.nan] * 5], ids=str)
def test_a_hint_never_changes_a_result(hint, direction, support, backend, device):
    model = random_model(5, V, 7, bias=True).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(5, K))
    options = {"direction": direction, "support": support}
    hint = torch.tensor(hint, device=device)
    outcome = by_topd(model, ids, logprobs, weights_hint=hint, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, **options), 1e-11)


@every_combination
def test_chunk_plans_agree(direction, support, backend, device):
    model = random_model(37, 300, 7, bias=True).to(device)
    ids, logprobs = (part.to(device) for part in random_teacher(37, K, vocab=300))
    options = {"direction": direction, "support": support}
    outcome = by_topd(model, ids, logprobs, workspace_bytes=100_000, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, ids, logprobs, **options), 1e-11)
