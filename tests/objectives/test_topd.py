"""topd.TOPD: a test for every row of the method."""

import pytest
import torch
from compare import assert_near
from objective_cases import backward, batch_of, models
from scipy.optimize import linear_sum_assignment
from tiny_models import VOCAB, checkpoint_activations, generated, prefix
from topd_cases import FEW, FOURTHS, GREEDY, assert_end_at_fourths, step

import topd


def states_of(model, batch, position, window):
    """[n, H] of the states that predict a window's tokens, by a forward of prefix and window."""
    whole = torch.cat([prefix(batch["input_ids"], batch["attention_mask"], position), window.unsqueeze(0)], dim=1)
    return model.base_model(whole).last_hidden_state[0, -len(window) - 1 : -1]


def trajectory_losses(student, batch, objective, temperature=1.0):
    """L_traj of each divergent point, written out: KL(target_i || p_S) over the whole vocabulary."""
    losses, windows = [], objective.near_future.windows
    for index in objective.near_future.divergent.nonzero()[:, 0].tolist():
        length = int(windows.student_lengths[index])
        hidden = states_of(student, batch, windows.positions[index], windows.student_tokens[index, :length])
        logprobs = (student.lm_head(hidden) / temperature).log_softmax(-1)
        plan = objective.near_future.transport.plan[index, :length]
        target = torch.zeros(length, VOCAB).index_add(1, windows.teacher_tokens[index], plan)
        target = target / target.sum(-1, keepdim=True)
        terms = torch.where(target > 0, target * (target.clamp_min(1e-38).log() - logprobs), 0.0)
        losses.append(terms.sum(-1).mean())
    return losses


@pytest.mark.parametrize("score", ["teacher_nll", "reverse_kl", "student_nll", "gap"])
def test_row_1_the_score_of_every_response_token(score):
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, score=score)
    scores = objective.scores
    expected = {
        "teacher_nll": -scores.teacher_logprob,
        "reverse_kl": scores.reverse_kl,
        "student_nll": -scores.student_logprob,
        "gap": scores.student_logprob - scores.teacher_logprob,
    }[score]
    assert torch.equal(objective.near_future.score, expected)
    assert (objective.near_future.score[batch["response_mask"] == 0] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"candidates": "top_fraction", "candidate_value": 0.2},
        {"candidates": "quantile", "candidate_value": 0.8},
        {"candidates": "threshold", "candidate_value": 4.5},
        {"min_separation": 3},
    ],
    ids=str,
)
def test_row_2_candidates_are_the_high_scores_of_each_trajectory(options):
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, **options)
    config = topd.TOPDConfig(**(FEW | options))
    rule = {"rule": config.candidates, "value": config.candidate_value, "min_separation": config.min_separation}
    expected = topd.select_candidates(objective.near_future.score, mask=batch["response_mask"] > 0, **rule)
    assert torch.equal(objective.near_future.windows.positions, expected)
    assert objective.metrics["candidates"] == len(expected) > 0


def test_row_3_both_models_continue_from_the_same_prefix():
    student, teacher = models()
    batch = batch_of()
    windows = step(student, teacher, batch, **GREEDY).near_future.windows
    for index, position in enumerate(windows.positions):
        ids = prefix(batch["input_ids"], batch["attention_mask"], position)
        assert windows.student_tokens[index].tolist() == generated(student, ids, 6, None)
        assert windows.teacher_tokens[index].tolist() == generated(teacher, ids, 6, None)
    assert (windows.student_way, windows.teacher_way) == ("branches", "branches")


def test_row_3_windows_end_at_the_students_end_of_sequence():
    student, teacher = models()
    student.generation_config.eos_token_id = FOURTHS
    windows = step(student, teacher, batch_of()).near_future.windows
    assert_end_at_fourths(windows)


def test_row_3_the_students_window_may_be_the_rollout():
    """No generation and no second forward: its states are the rollout's."""
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, student_window="rollout")
    windows = objective.near_future.windows
    for position, window, length in zip(windows.positions, windows.student_tokens, windows.student_lengths, strict=True):
        row, column = position.tolist()
        assert window[:length].tolist() == batch["input_ids"][row, column : column + int(length)].tolist()
    losses = trajectory_losses(student, batch, objective)
    assert_near(objective.metrics["guidance_loss"], torch.stack(losses).mean().detach().double(), 1e-5)
    assert windows.student_way == "rollout"


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "mismatch"])
@pytest.mark.parametrize("embedding", ["student", "teacher", "table"])
def test_row_4_the_cost_compares_tokens_in_an_embedding(cost, embedding):
    student, teacher = models()
    table = torch.randn(VOCAB, 5)
    tables = {"student": student.model.embed_tokens.weight, "teacher": teacher.model.embed_tokens.weight, "table": table}
    chosen = table if embedding == "table" else embedding
    near = step(student, teacher, batch_of(), cost=cost, embedding=chosen).near_future
    windows = near.windows
    expected = topd.near_future_divergence(
        windows.student_tokens, windows.teacher_tokens, tables[embedding].detach(), cost=cost, epsilon=0.05
    )
    assert torch.equal(near.transport.distance, expected.distance)
    assert torch.equal(near.transport.plan, expected.plan)


def test_row_4_the_cost_may_compare_the_students_states():
    student, teacher = models()
    batch = batch_of()
    near = step(student, teacher, batch, embedding="student_hidden", **GREEDY).near_future
    windows, after = near.windows, torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        vectors = [
            torch.stack(
                [states_of(student, batch, p, torch.cat([w, after]))[1:] for p, w in zip(windows.positions, side, strict=True)]
            )
            for side in (windows.student_tokens, windows.teacher_tokens)
        ]
    expected = topd.near_future_divergence(student_vectors=vectors[0], teacher_vectors=vectors[1])
    assert_near(near.transport.distance, expected.distance.double(), 1e-4)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_row_5_the_distance_is_optimal_transport_with_uniform_marginals(solver):
    student, teacher = models()
    objective = step(student, teacher, batch_of(), solver=solver, epsilon=0.001)
    windows, transport = objective.near_future.windows, objective.near_future.transport
    table = torch.nn.functional.normalize(student.model.embed_tokens.weight.detach(), dim=-1)
    for index, distance in enumerate(transport.distance.tolist()):
        cost = 1 - table[windows.student_tokens[index]] @ table[windows.teacher_tokens[index]].T
        rows, columns = linear_sum_assignment(cost.numpy())
        assert distance == pytest.approx(cost[rows, columns].mean().item(), abs=2e-3)
    assert_near(transport.plan.sum(-1), torch.full((9, 6), 1 / 6, dtype=torch.float64), 1e-5)
    assert_near(transport.plan.sum(-2), torch.full((9, 6), 1 / 6, dtype=torch.float64), 1e-5)
    assert objective.metrics["marginal_error"] == transport.marginal_error.max()


@pytest.mark.parametrize(
    "options",
    [{}, {"gate_value": 0.5}, {"gate": "threshold", "gate_value": "median"}, {"gate": "mean_plus_std", "gate_value": 0.5}],
    ids=str,
)
def test_row_6_the_gate_splits_candidates_by_distance(options):
    student, teacher = models()
    if options.get("gate_value") == "median":
        options = options | {"gate_value": step(student, teacher, batch_of()).near_future.transport.distance.median().item()}
    objective = step(student, teacher, batch_of(), **options)
    distance, real = objective.near_future.transport.distance, objective.near_future.divergent
    config = topd.TOPDConfig(**options)
    assert torch.equal(real, topd.divergent(distance, rule=config.gate, value=config.gate_value))
    assert 0 < real.sum() < 9
    metrics = objective.metrics
    assert metrics["divergent_points"] + metrics["false_alarms"] == metrics["candidates"] == 9
    assert metrics["divergent_points"] == real.sum()
    assert metrics["low_divergence_share"] == pytest.approx((~real).sum().item() / 9)
    assert metrics["distance_divergent"] == distance[real].median()
    assert metrics["distance_false_alarm"] == distance[~real].median()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_7_and_8_targets_are_rows_of_the_plan_and_contexts_the_students(temperature):
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, temperature=temperature)
    losses = trajectory_losses(student, batch, objective, temperature)
    assert objective.metrics["guidance_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_row_7_a_token_at_several_places_is_one_token():
    """A teacher who repeats one token: every target is that token, and the loss its cross-entropy."""
    student, teacher = models()
    with torch.no_grad():
        teacher.lm_head.weight.zero_()  # all logits equal: greedy always draws token 0
    batch = batch_of()
    objective = step(student, teacher, batch, **GREEDY)
    windows, expected = objective.near_future.windows, []
    assert (windows.teacher_tokens == 0).all()
    for index in objective.near_future.divergent.nonzero()[:, 0].tolist():
        hidden = states_of(student, batch, windows.positions[index], windows.student_tokens[index])
        expected.append(-student.lm_head(hidden).log_softmax(-1)[:, 0].mean().item())
    assert objective.metrics["guidance_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"student_window": "rollout"}, {"guidance_weight": 2.0}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_row_9_the_sum_in_value_and_gradient(options, checkpointing):
    """Through the windows, their prefixes and the head."""
    student, teacher = models()
    batch = batch_of()
    if checkpointing:
        checkpoint_activations(student.train())
    objective = step(student, teacher, batch, **options)
    gradient = backward(student, objective.loss)
    student.eval()
    base = topd.OPD(student, teacher)(batch)
    weight = options.get("guidance_weight", 0.1)
    expected = base.loss + weight * torch.stack(trajectory_losses(student, batch, objective)).mean()
    assert_near(objective.loss.detach(), expected.detach().double(), 1e-5, "loss")
    assert_near(gradient, backward(student, expected).double(), 1e-5, "gradient")
    assert_near(objective.metrics["opd_loss"], base.loss.detach().double(), 1e-5)
    assert objective.metrics["second_forward"] == checkpointing
    assert objective.metrics["student_branches"] == ("student_window" not in options)


@pytest.mark.parametrize(("mode", "score"), [("cap", "teacher_nll"), ("mask", "teacher_nll"), ("cap", "gap"), ("mask", "gap")])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_row_10_false_alarms_weigh_less_but_count(mode, score, reduction):
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, false_alarms=mode, score=score, guidance_weight=0, reduction=reduction)
    gradient = backward(student, objective.loss)
    near = objective.near_future
    response = batch["response_mask"] > 0
    masks = {"attention_mask": batch["attention_mask"]}
    student_hidden, teacher_hidden = (
        model.base_model(batch["input_ids"], **masks).last_hidden_state[:, :-1] for model in (student, teacher)
    )
    heads = topd.Head(student.lm_head.weight), topd.Head(teacher.lm_head.weight.detach())
    losses = topd.linear_divergence(student_hidden, heads[0], teacher_hidden.detach(), heads[1], mask=response[:, 1:])
    of_tokens = torch.nn.functional.pad(losses.detach(), (1, 0))
    weights = topd.false_alarm_weights(of_tokens, near.windows.positions, near.divergent, mask=response, mode=mode)
    assert (weights < 1).sum() > 0
    weighted, counts = losses * weights[:, 1:], response.sum(-1)
    expected = weighted.sum() / counts.sum() if reduction == "token" else (weighted.sum(-1) / counts).mean()
    assert_near(objective.loss.detach(), expected.detach().double(), 1e-5, "loss")
    assert_near(gradient, backward(student, expected).double(), 1e-5, "gradient")
