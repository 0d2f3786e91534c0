"""topd.guidance_kl: the mean over a student's window of KL(row of the plan, over the teacher's tokens || p_S)."""

import math
from typing import Any

import compare
import pytest
import torch
from compare import CONSTANT, TENSORS, Model, Outcome, outcome_of, random_model

import topd
from topd import guidance_kl

M, K_S, K_T, V, H = 3, 5, 4, 19, 7

HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "everything": ({"bias": True, "rank": 3, "softcap": 8.0, "scale": -0.8}, {"temperature": 1.6}),
}


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_plan(m: int = M, rows: int = K_S, columns: int = K_T) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher tokens with repeats, and rows of any sum, some entries 0."""
    plan = torch.rand(m, rows, columns, dtype=torch.float64)
    plan[..., 1:] = plan[..., 1:].masked_fill(torch.rand(m, rows, columns - 1) < 0.3, 0.0)
    return torch.randint(5, (m, columns)), plan


def full_guidance(
    model: Model, tokens: torch.Tensor, plan: torch.Tensor, lengths: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """[m], from the distributions over the whole vocabulary, one window after another."""
    logits = model.logits()
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    values = []
    for i in range(len(plan)):
        rows = plan.shape[1] if lengths is None else int(lengths[i])
        weights = plan[i, :rows].to(logprobs.dtype)
        q = weights.new_zeros(rows, logprobs.shape[-1])
        for j, token in enumerate(tokens[i].tolist()):
            q[:, token] += weights[:, j] / weights.sum(1)
        values.append((torch.special.xlogy(q, q) - q * logprobs[i, :rows]).sum(1).mean())
    return torch.stack(values)


def truth(model: Model, *arguments: Any, dtype: torch.dtype | None = torch.float64) -> Outcome:
    return outcome_of(model, dtype, lambda leaves: full_guidance(leaves, *arguments))


def by_topd(model: Model, tokens: torch.Tensor, plan: torch.Tensor, **options: Any) -> Outcome:
    return outcome_of(model, None, lambda leaves: guidance_kl(leaves.hidden, leaves.head(), tokens, plan, **options))


def test_literal_values_and_gradient(backend):
    """p = (1/4, 1/2, 1/4) everywhere; the targets (1, 0, 0) from two places, and (1/2, 1/2, 0); their mean."""
    hidden = torch.ones(1, 2, 1, dtype=torch.float64, requires_grad=True)
    head = topd.Head(f64([[0], [math.log(2)], [0]]).requires_grad_())
    tokens, plan = torch.tensor([[0, 1, 0]]), f64([[[0.1, 0, 0.3], [0.2, 0.4, 0.2]]])
    value = guidance_kl(hidden, head, tokens, plan, backend=backend)
    torch.testing.assert_close(value, f64([(math.log(4) + 0.5 * math.log(2)) / 2]), rtol=1e-12, atol=0)
    value.backward()
    torch.testing.assert_close(head.weight.grad, f64([[-3 / 4 - 1 / 4], [1 / 2], [1 / 4 + 1 / 4]]) / 2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(hidden.grad, f64([[[math.log(2) / 4], [0]]]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("model", "options"), HEADS.values(), ids=HEADS.keys())
def test_float64_value_and_gradients(model, options, backend, device):
    model = random_model((M, K_S), V, H, **model).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    outcome = by_topd(model, tokens, plan, backend=backend, **options)
    compare.assert_outcome(outcome, truth(model, tokens, plan, None, *options.values()), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_at_the_dtype(dtype, backend, device):
    model = random_model((16, 8), 300, H, bias=True).to(device).to(dtype)
    tokens, plan = (part.to(device) for part in random_plan(16, 8, 6))
    outcome, true = by_topd(model, tokens, plan, backend=backend), truth(model, tokens, plan)
    yardstick = truth(model, tokens, plan, dtype=None)
    compare.assert_no_worse(outcome.value, yardstick.value, true.value, CONSTANT, "value")
    for name, gradient in true.grads.items():
        compare.assert_no_worse(outcome.grads[name], yardstick.grads[name], gradient, CONSTANT, f"gradient of {name}")


def test_rows_past_the_length_are_ignored(backend, device):
    """Their plan, and in the value their states, may be NaN; their states get no gradient."""
    model = random_model((M, K_S), V, H, bias=True).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    lengths = torch.tensor([1, K_S, 3], device=device)
    true = truth(model, tokens, plan, lengths)
    past = torch.arange(K_S, device=device) >= lengths.unsqueeze(1)
    plan[past] = math.nan
    outcome = by_topd(model, tokens, plan, student_lengths=lengths, backend=backend)
    compare.assert_outcome(outcome, true, 1e-11)
    assert outcome.grads["hidden"][past].eq(0).all()
    model.hidden[past] = math.nan
    value = guidance_kl(model.hidden, model.head(), tokens, plan, student_lengths=lengths, backend=backend)
    compare.assert_near(value, true.value, 1e-11)


@pytest.mark.parametrize("token", [-1, -100, 10**9])
def test_tokens_where_the_plan_is_zero_are_never_read(token, backend, device):
    """As the teacher's padding is."""
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    plan[..., 2:] = 0
    true = truth(model, tokens, plan)
    tokens[:, 2:] = token
    compare.assert_outcome(by_topd(model, tokens, plan, backend=backend), true, 1e-11)


def test_one_token_fifty_times_has_no_entropy(backend, device):
    model = random_model((M, K_S), V, H).to(device)
    token = torch.randint(V, (M, 1), device=device)
    plan = torch.rand(M, K_S, 50, dtype=torch.float64, device=device)

    def cross_entropy(leaves: Model) -> torch.Tensor:
        logprobs = leaves.logits().log_softmax(-1)
        return -logprobs.gather(-1, token.unsqueeze(1).expand(M, K_S, 1))[..., 0].mean(1)

    outcome = by_topd(model, token.expand(M, 50), plan, backend=backend)
    compare.assert_outcome(outcome, outcome_of(model, torch.float64, cross_entropy), 1e-11)


def test_the_gradient_is_that_of_the_papers_sum(backend, device):
    """sum_ij P_ij (-log p(x_j | context i)), whose rows sum to 1 / K_S: the value less the targets' mean entropy."""
    model = random_model((M, K_S), V, H, bias=True).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    plan = plan / (K_S * plan.sum(-1, keepdim=True))

    def literal_sum(leaves: Model) -> torch.Tensor:
        index = tokens.unsqueeze(1).expand(M, K_S, K_T)
        return -(plan * leaves.logits().log_softmax(-1).gather(-1, index)).sum((1, 2))

    outcome, sums = by_topd(model, tokens, plan, backend=backend), outcome_of(model, torch.float64, literal_sum)
    compare.assert_outcome(Outcome(sums.value, outcome.grads), sums, 1e-11)
    assert (outcome.value <= sums.value).all()


def test_a_rows_mass_changes_nothing(backend, device):
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    expected = by_topd(model, tokens, plan, backend=backend)
    masses = 10 ** torch.linspace(-6, 3, M * K_S, dtype=torch.float64, device=device).view(M, K_S, 1)
    compare.assert_outcome(by_topd(model, tokens, plan * masses, backend=backend), expected, 1e-11)


HINTS = {"equal": [1.0, 1.0, 1.0], "exact": [-1.0, 0.5, 2.0], "wrong": [3.0, -7.0, 0.1], "zero": [0.0, 0.0, 0.0]}


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS.keys())
def test_a_hint_never_changes_the_result(hint, ragged, backend, device):
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    lengths = torch.tensor([2, K_S, 1], device=device) if ragged else None
    outcome = by_topd(model, tokens, plan, student_lengths=lengths, weights_hint=f64(hint).to(device), backend=backend)
    compare.assert_outcome(outcome, truth(model, tokens, plan, lengths), 1e-11)


def test_a_small_workspace(backend, device):
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    outcome = by_topd(model, tokens, plan, workspace_bytes=8000, backend=backend)
    compare.assert_outcome(outcome, truth(model, tokens, plan), 1e-11)


def test_a_frozen_head_gets_no_gradient(backend, device):
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    true = truth(model, tokens, plan)
    hidden = model.hidden.clone().requires_grad_()
    value = guidance_kl(hidden, model.head(), tokens, plan, backend=backend)
    value.backward(torch.linspace(-1, 2, M, dtype=torch.float64, device=device))
    compare.assert_near(hidden.grad, true.grads["hidden"], 1e-11)
    assert model.weight.grad is None


def test_non_contiguous_operands(backend, device):
    model = random_model((M, K_S), V, H).to(device)
    tokens, plan = (part.to(device) for part in random_plan())
    expected = by_topd(model, tokens, plan, backend=backend)
    strided = model.map(lambda _, value: value.mT.contiguous().mT)
    tokens, plan = tokens.mT.contiguous().mT, plan.repeat_interleave(2, -1)[..., ::2]
    compare.assert_outcome(by_topd(strided, tokens, plan, backend=backend), expected, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_plan_may_have_any_floating_dtype(dtype, backend, device):
    model = random_model((M, K_S), V, H).to(device).to(torch.float32)
    tokens, plan = (part.to(device) for part in random_plan())
    plan = plan.to(dtype)
    value = guidance_kl(model.hidden, model.head(), tokens, plan, backend=backend)
    assert value.dtype == torch.float32
    compare.assert_near(value, full_guidance(model.to(torch.float64), tokens, plan.double()), 1e-5)


@pytest.mark.parametrize("lengths", [None, torch.ones(0, dtype=torch.int64)], ids=["full", "lengths"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_windows(dtype, lengths, backend):
    hidden, weight = torch.zeros(0, K_S, H, dtype=dtype, requires_grad=True), torch.ones(V, H, dtype=dtype, requires_grad=True)
    tokens, plan = torch.zeros(0, K_T, dtype=torch.int64), torch.zeros(0, K_S, K_T)
    value = guidance_kl(hidden, topd.Head(weight), tokens, plan, student_lengths=lengths, backend=backend)
    assert value.shape == (0,)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    value.sum().backward()
    assert hidden.grad.shape == (0, K_S, H)
    assert weight.grad is None or weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plan_of_near_future_divergence(dtype, backend, device):
    """Ragged on both sides, fed straight in: finite, not negative, the truth, and repeatable."""
    model = random_model((M, K_S), V, H).to(device)
    student, teacher = torch.randint(V, (M, K_S), device=device), torch.randint(V, (M, K_T), device=device)
    lengths = {"student_lengths": torch.tensor([2, K_S, 1]), "teacher_lengths": torch.tensor([K_T, 1, 3])}
    lengths = {name: value.to(device) for name, value in lengths.items()}
    transport = topd.near_future_divergence(student, teacher, model.weight.to(dtype), **lengths)
    true = truth(model, teacher, transport.plan, lengths["student_lengths"])
    teacher[torch.arange(K_T, device=device) >= lengths["teacher_lengths"].unsqueeze(1)] = -1
    options = {"student_lengths": lengths["student_lengths"], "backend": backend}
    result = by_topd(model, teacher, transport.plan, **options)
    compare.assert_outcome(result, true, 1e-11)
    assert (result.value >= 0).all()
    assert torch.equal(by_topd(model, teacher, transport.plan, **options).value, result.value)


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_from_scores_to_guidance(mode, backend, device):
    """The method end to end on a few random windows."""
    model = random_model((2, 30), V, H).to(device).to(torch.float32).leaves(TENSORS)
    tokens = torch.randint(V, (2, 30), device=device)
    losses = -topd.linear_logprobs(model.hidden, model.head(), tokens.unsqueeze(-1), backend=backend)[..., 0]
    positions = topd.select_candidates(losses.detach(), rule="top_k", value=3)
    m, windows = len(positions), torch.randint(V, (2, len(positions), K_S), device=device)
    transport = topd.near_future_divergence(*windows, model.weight)
    chosen = topd.divergent(transport.distance)
    weights = topd.false_alarm_weights(losses.detach(), positions, chosen, mode=mode)
    states = model.hidden[positions[:, 0], positions[:, 1]].unsqueeze(1).expand(m, K_S, H)[chosen]
    guidance = guidance_kl(states, model.head(), windows[1][chosen], transport.plan[chosen], backend=backend)
    assert guidance.shape == (5,)  # of the six candidates the one of the lowest distance goes out
    loss = (weights * losses).mean() + 0.1 * guidance.mean()
    loss.backward()
    assert loss.isfinite()
    for gradient in (model.hidden.grad, model.weight.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
