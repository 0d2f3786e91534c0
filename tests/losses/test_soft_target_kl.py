"""topd.soft_target_kl: KL(q || p_S) of a target distribution over a few tokens of each row."""

import math

import compare
import pytest
import torch
from compare import CONSTANT, Model, random_model
from soft_target_cases import M, N, V, by_topd, full_kl, random_targets, truth

import topd


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quarter_head() -> tuple[torch.Tensor, topd.Head]:
    """Two rows with p = (1/4, 1/2, 1/4)."""
    hidden = f64([[1], [1]]).requires_grad_()
    return hidden, topd.Head(f64([[0], [math.log(2)], [0]]).requires_grad_())


def test_literal_values_and_gradient(backend):
    """q = (1/2, 1/2, 0), and all of it on the first token; the gradient to the logits is p - q."""
    hidden, head = quarter_head()
    value = topd.soft_target_kl(hidden, head, torch.tensor([[0, 1], [0, 2]]), f64([[0.5, 0.5], [1, 0]]), backend=backend)
    torch.testing.assert_close(value, f64([0.5 * math.log(2), math.log(4)]), rtol=1e-12, atol=0)
    value.backward(f64([1, 3]))
    torch.testing.assert_close(head.weight.grad, f64([[-1 / 4 - 9 / 4], [0 + 3 / 2], [1 / 4 + 3 / 4]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, f64([[0], [3 * math.log(2) / 2]]), rtol=1e-12, atol=1e-15)


HEADS = {
    "plain": ({}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "bias": ({"bias": True}, {}),
    "everything": ({"bias": True, "rank": 3, "softcap": 8.0, "scale": -0.8}, {"temperature": 1.6}),
}


@pytest.mark.parametrize(("model", "options"), HEADS.values(), ids=HEADS.keys())
def test_float64_value_and_gradients(model, options, backend, device):
    model = random_model(N, V, 7, **model).to(device)
    ids, probs = (part.to(device) for part in random_targets(N, M))
    compare.assert_outcome(by_topd(model, ids, probs, backend=backend, **options), truth(model, ids, probs, **options), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_at_the_dtype(dtype, backend, device):
    model = random_model(64, 300, 7, bias=True).to(device).to(dtype)
    ids, probs = (part.to(device) for part in random_targets(64, M, vocab=300))
    outcome, true = by_topd(model, ids, probs, backend=backend), truth(model, ids, probs)
    yardstick = truth(model, ids, probs, dtype=None)
    compare.assert_no_worse(outcome.value, yardstick.value, true.value, CONSTANT, "value")
    for name, gradient in true.grads.items():
        compare.assert_no_worse(outcome.grads[name], yardstick.grads[name], gradient, CONSTANT, f"gradient of {name}")


def test_any_leading_shape(backend, device):
    model = random_model((3, 4), V, 7).to(device)
    ids, probs = (part.to(device) for part in random_targets(3, 4, M))
    mask = torch.rand(3, 4, device=device) < 0.6
    outcome = by_topd(model, ids, probs, mask=mask, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs, mask=mask), 1e-11)
    one = topd.soft_target_kl(model.hidden[1, 2], model.head(), ids[1, 2], probs[1, 2], backend=backend)
    torch.testing.assert_close(one, full_kl(model, ids, probs)[1, 2], rtol=1e-12, atol=0)


def test_repeats_are_one_token_before_the_entropy(backend, device):
    """One token fifty times with 1/50 each has the cross-entropy's value, -log p: its entropy is 0."""
    model = random_model(N, V, 7).to(device)
    token = torch.randint(V, (N, 1), device=device)
    fifty = torch.full((N, 50), 1 / 50, dtype=torch.float64, device=device)
    outcome = by_topd(model, token.expand(-1, 50), fifty, backend=backend)
    compare.assert_outcome(outcome, truth(model, token, torch.ones_like(fifty[:, :1])), 1e-11)


def test_repeats_among_others_and_padding(backend, device):
    model = random_model(N, V, 7).to(device)
    ids = torch.randint(5, (N, 12), device=device)
    probs = torch.rand(N, 12, dtype=torch.float64, device=device).masked_fill(torch.rand(N, 12, device=device) < 0.3, 0.0)
    ids = ids.masked_fill(probs == 0, 10**12)
    outcome = by_topd(model, ids, probs, normalize=True, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs / probs.sum(-1, keepdim=True)), 1e-11)


@pytest.mark.parametrize("padding", [-100, -1, 3, V, 2**62])
def test_ids_of_probability_zero_are_never_read(padding, backend, device):
    """3 is also a true token of each row."""
    model = random_model(N, V, 7).to(device)
    ids, probs = torch.tensor([[3, 8]], device=device).expand(N, -1), f64([[0.25, 0.75]]).to(device).expand(N, -1)
    padded_ids = torch.cat([torch.full((N, 1), padding, device=device), ids], -1)
    padded_probs = torch.cat([torch.zeros_like(probs[:, :1]), probs], -1)
    outcome = by_topd(model, padded_ids, padded_probs, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs), 1e-11)


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_rows_are_unchecked_and_exactly_zero(normalize, backend, device):
    """Masked: a row of NaN states, then NaN, negative and zero probabilities with ids that do not exist."""
    clean = random_model(5, V, 7).to(device)
    ids, probs = (part.to(device) for part in random_targets(5, M))
    mask = torch.tensor([False, False, False, False, True], device=device)
    true = truth(clean, ids, probs, mask=mask)
    model = clean.map(
        lambda name, value: value.index_fill(0, torch.tensor(0, device=device), math.nan) if name == "hidden" else value
    )
    probs[1], probs[2], probs[3] = math.nan, -1, 0
    ids[1:4] = 10**9
    outcome = by_topd(model, ids, probs, mask=mask, normalize=normalize, backend=backend)
    compare.assert_outcome(outcome, true, 1e-11)
    assert not outcome.value[:4].any()
    assert not outcome.grads["hidden"][:4].any()


def test_digits_where_the_targets_are_the_students_own_top_tokens(backend, device):
    """The renormalised top 8 of a student who leaves about 1e-8 beside them: KL = -log(their mass)."""
    bias = torch.full((300,), -20.0)
    bias[:8] = 4.0
    model = Model(0.3 * torch.randn(64, 16), 0.3 * torch.randn(300, 16), bias).to(device)
    logprobs = model.to(torch.float64).logits().log_softmax(-1)
    top, ids = logprobs.topk(8, dim=-1)
    probs = top.softmax(-1)
    outside = logprobs.exp().scatter(-1, ids, 0.0).sum(-1)
    true = -torch.log1p(-outside)
    assert 1e-9 < true.median() < 1e-7
    value = topd.soft_target_kl(model.hidden, model.head(), ids, probs, backend=backend)
    assert value.dtype == torch.float32
    assert ((value.double() - true) / true).abs().max() < 1e-4


def near_targets(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token, log q - log p about 1e-4 at random: KL is about 5e-9."""
    logprobs = model.to(torch.float64).logits().log_softmax(-1)
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device).expand_as(logprobs)
    return ids, (logprobs + 1e-4 * torch.randn_like(logprobs)).softmax(-1)


def test_digits_where_the_targets_are_near_the_students_probabilities(backend, device):
    """float32 log-probabilities are off by 1e-7, a thousandth of the log-ratios of 1e-4 here."""
    model = Model(0.2 * torch.randn(64, 16), torch.randn(50, 16)).to(device)
    ids, probs = near_targets(model)
    true = full_kl(model.to(torch.float64), ids, probs)
    assert 1e-9 < true.median() < 1e-8
    value = topd.soft_target_kl(model.hidden, model.head(), ids, probs, backend=backend)
    relative = ((value.double() - true) / true).abs()
    assert relative.median() < 1e-3
    assert relative.max() < 1e-2


@pytest.mark.parametrize("normalize", [False, True])
def test_never_negative(normalize, backend, device):
    """Targets that the student meets exactly, rounded to float32: their sums are off 1 by a rounding error."""
    model = random_model(200, 12, 4).to(device).to(torch.float32)
    ids = torch.arange(12, device=device).expand(200, -1)
    probs = model.logits().softmax(-1)
    value = topd.soft_target_kl(model.hidden, model.head(), ids, probs, normalize=normalize, backend=backend)
    assert value.min() >= 0
    assert value.max() < 1e-6


def test_a_target_that_the_student_excludes_is_inf_without_nan_gradients(backend, device):
    """Token 2 has a bias of -inf: row 0 does not ask for it, row 1 does, row 2 has it with probability 0."""
    model = random_model(3, V, 7, bias=True).to(device)
    model.bias[2] = -math.inf
    ids = torch.tensor([[4, 5], [2, 5], [2, 5]], device=device)
    probs = f64([[0.5, 0.5], [0.5, 0.5], [0, 1]]).to(device)
    outcome = by_topd(model, ids, probs, backend=backend)
    logprobs = model.logits().log_softmax(-1)
    assert outcome.value[0].item() == pytest.approx((math.log(0.5) - logprobs[0, [4, 5]].mean()).item(), rel=1e-12)
    assert outcome.value[1] == math.inf
    assert outcome.value[2].item() == pytest.approx(-logprobs[2, 5].item(), rel=1e-12)
    for name, gradient in outcome.grads.items():
        assert gradient.isfinite().all(), name
    assert outcome.grads["hidden"][[0, 2]].any(-1).all()


def test_a_row_that_is_inf_has_no_gradient(backend, device):
    """Not a part of one either: what the mass outside its targets would send alone is no direction to go."""
    model = random_model(2, V, 7, bias=True).to(device)
    model.bias[2] = -math.inf
    ids, probs = torch.tensor([[4, 5], [2, 5]], device=device), torch.full((2, 2), 0.5, device=device)
    outcome = by_topd(model, ids, probs, backend=backend)
    assert outcome.value.isinf().tolist() == [False, True]
    assert torch.equal(outcome.grads["hidden"][1], torch.zeros(7, dtype=torch.float64, device=device))


@pytest.mark.parametrize("hint", [[1.0, 0, 2, -1, 5], [0.0] * 5, [math.nan] * 5], ids=str)
def test_a_hint_never_changes_a_result(hint, backend, device):
    model = random_model(5, V, 7, bias=True).to(device)
    ids, probs = (part.to(device) for part in random_targets(5, M))
    outcome = by_topd(model, ids, probs, weights_hint=torch.tensor(hint, device=device), backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs), 1e-11)


@pytest.mark.parametrize("workspace_bytes", [40_000, 100_000, None])
def test_chunk_plans_agree(workspace_bytes, backend, device):
    model = random_model(37, 300, 7, bias=True).to(device)
    ids, probs = (part.to(device) for part in random_targets(37, M, vocab=300))
    outcome = by_topd(model, ids, probs, workspace_bytes=workspace_bytes, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs), 1e-11)


def test_no_rows(backend, device):
    model = random_model(0, V, 7).to(device)
    ids, probs = torch.zeros(0, 3, dtype=torch.int64, device=device), torch.zeros(0, 3, device=device)
    outcome = by_topd(model, ids, probs, backend=backend)
    assert outcome.value.shape == (0,)
    assert torch.equal(outcome.grads["weight"], torch.zeros_like(model.weight))
    assert outcome.grads["hidden"].shape == (0, 7)
