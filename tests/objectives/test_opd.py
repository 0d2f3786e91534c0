"""topd.OPD: the divergence of every response token, by the token's column, in value and gradient."""

import pytest
import torch
from compare import assert_near, row_divergence
from objective_cases import MILD, backward, batch_of, models, reduced
from tiny_models import bloom, checkpoint_activations, flat_gradient, tiny

import topd
from topd.objectives.diagnostics import DIAGNOSTICS


def plain_losses(student, teacher, batch, divergence, temperature=1.0, hard_weight=0.0):
    """[B, T] from full logits, each rollout alone and without padding; column t is about token t."""
    ids, mask, response = (batch[key] for key in ("input_ids", "attention_mask", "response_mask"))
    losses = torch.zeros(ids.shape)
    for row in range(ids.shape[0]):
        columns = mask[row].nonzero()[:, 0]
        tokens = ids[row, columns].unsqueeze(0)
        s, t = ((model(tokens).logits[0, :-1] / temperature).log_softmax(-1) for model in (student, teacher))
        loss = row_divergence(divergence, s, t.detach())
        loss = loss - hard_weight * s.gather(-1, tokens[0, 1:].unsqueeze(-1))[:, 0]
        losses = losses.index_put((torch.full_like(columns[1:], row), columns[1:]), loss)
    return torch.where(response > 0, losses, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sequence"},
        {"temperature": 0.7, "hard_weight": 0.3},
        {"divergence": topd.JSD(0.3), "reduction": "sequence"},
        {"divergence": "forward_kl"},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_items", [None, 100])
def test_value_and_gradient_equal_the_plain_formula(options, num_items):
    student, teacher = models()
    batch, config = batch_of(), topd.OPDConfig(**options)
    objective = topd.OPD(student, teacher, config)(batch, num_items=num_items)
    gradient = backward(student, objective.loss)
    divergence = {"reverse_kl": topd.ReverseKL(), "forward_kl": topd.ForwardKL()}.get(config.divergence, config.divergence)
    losses = plain_losses(student, teacher, batch, divergence, config.temperature, config.hard_weight)
    expected = reduced(losses, batch["response_mask"], config.reduction, num_items)
    assert_near(objective.loss.detach(), expected.detach().double(), 1e-5, "loss")
    assert_near(gradient, backward(student, expected).double(), 1e-5, "gradient")
    assert objective.metrics["loss"] == objective.metrics["opd_loss"] == objective.loss.detach()
    assert objective.metrics["sequence_reduction"] == (config.reduction == "sequence")
    assert objective.near_future is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_scores_stand_at_their_tokens_column():
    student, teacher = models()
    batch = batch_of()
    scores = topd.OPD(student, teacher)(batch).scores
    response = batch["response_mask"] > 0
    losses = plain_losses(student, teacher, batch, topd.ReverseKL()).detach()
    assert_near(scores.reverse_kl, losses.double(), 1e-5)
    with torch.no_grad():
        whole = batch["input_ids"][1:2, :15]
        expected = teacher(whole).logits[0].log_softmax(-1)[3:14].gather(-1, whole[0, 4:].unsqueeze(-1))[:, 0]
    assert_near(scores.teacher_logprob[1, 4:15], expected.double(), 1e-5)
    assert (scores.teacher_logprob[~response] == 0).all()
    assert not scores.reverse_kl.requires_grad


def test_metrics_are_means_over_response_tokens():
    student, teacher = models()
    batch = batch_of()
    objective = topd.OPD(student, teacher)(batch)
    count = batch["response_mask"].sum()
    assert objective.metrics["tokens"] == count
    assert_near(objective.metrics["student_entropy"], (objective.scores.student_entropy.sum() / count).double(), 1e-6)
    assert_near(objective.metrics["teacher_entropy"], (objective.scores.teacher_entropy.sum() / count).double(), 1e-6)
    stages = {"seconds_student_forward", "seconds_teacher_forward", "seconds_divergence"}
    assert stages <= objective.metrics.keys()
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in objective.metrics.values())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_an_empty_response_trains_on(reduction):
    """It adds nothing, and does not count as a response."""
    student, teacher = models()
    config = topd.OPDConfig(reduction=reduction)
    with_empty, rows = batch_of(empty=[1]), torch.tensor([0, 2])
    without = {key: value[rows] for key, value in batch_of().items()}
    objective, expected = (topd.OPD(student, teacher, config)(each) for each in (with_empty, without))
    assert_near(objective.loss.detach(), expected.loss.detach().double(), 1e-6)
    assert_near(backward(student, objective.loss), backward(student, expected.loss).double(), 1e-5)


@pytest.mark.parametrize("config", [topd.OPDConfig(), topd.TOPDConfig(), topd.TOPDConfig(reduction="sequence")])
def test_no_response_at_all_gives_zeros(config):
    student, teacher = models()
    method = topd.TOPD if isinstance(config, topd.TOPDConfig) else topd.OPD
    objective = method(student, teacher, config)(batch_of(empty=[0, 1, 2]))
    assert objective.loss == 0
    assert (backward(student, objective.loss) == 0).all()
    unmeasured = {"distance_divergent", "distance_false_alarm"} if isinstance(config, topd.TOPDConfig) else set()
    unmeasured |= set(DIAGNOSTICS) & set(objective.metrics)
    assert {name for name, value in objective.metrics.items() if not value.isfinite()} == unmeasured


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_num_items_gives_the_gradient_of_the_larger_batch(reduction):
    student, teacher = models()
    objective = topd.OPD(student, teacher, topd.OPDConfig(reduction=reduction))
    batch = batch_of(empty=[2])
    whole = backward(student, objective(batch).loss)
    items = batch["response_mask"].sum() if reduction == "token" else 2
    student.zero_grad()
    for row in range(3):
        objective({key: value[row : row + 1] for key, value in batch.items()}, num_items=items).loss.backward()
    assert_near(flat_gradient(student), whole.double(), 1e-5)


def test_a_model_may_teach_itself_and_bools_are_masks_too():
    student, _ = models()
    batch = batch_of()
    masks = {key: batch[key] > 0 for key in ("attention_mask", "response_mask")}
    objective = topd.OPD(student, student)(batch | masks)
    assert 0 <= objective.loss < 1e-5
    assert_near(objective.loss.detach(), topd.OPD(student, student)(batch).loss.detach().double(), 1e-9)


def test_vocabularies_that_differ_are_compared_on_the_common_one():
    student, teacher = models()[0], tiny("llama", seed=3, vocab_size=70, **MILD)
    objective = topd.OPD(student, teacher, allow_unequal_vocabularies=True)(batch_of())
    assert objective.loss > 0
    assert objective.scores.teacher_lost_mass[batch_of()["response_mask"] > 0].min() > 0


def test_models_that_cannot_branch_and_checkpointed_ones_train_too():
    student, teacher = models()
    batch = batch_of()
    expected = topd.OPD(student, teacher)(batch)
    gradient = backward(student, expected.loss)
    checkpoint_activations(student.train())
    objective = topd.OPD(student, teacher)(batch)
    assert_near(backward(student, objective.loss), gradient.double(), 1e-5)
    other = bloom()
    assert backward(other, topd.OPD(other, teacher)(batch).loss).abs().max() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"response_mask": None}, TypeError, "response_mask must be a torch.Tensor, got NoneType"),
        ({"response_mask": torch.ones(3, 20)}, TypeError, "response_mask must be bool or integers 0 and 1"),
        (
            {"response_mask": torch.ones(3, 20, dtype=torch.bool)},
            ValueError,
            r"response_mask must be True only where .* \[0, 0\]",
        ),
        ({"response_mask": torch.ones(3, 19, dtype=torch.bool)}, ValueError, "response_mask must have shape"),
        ({"input_ids": torch.zeros(3, 20, dtype=torch.int32)}, TypeError, "input_ids must be torch.int64"),
    ],
)
def test_bad_batches_are_refused(change, error, message):
    objective = topd.OPD(*models())
    with pytest.raises(error, match=message):
        objective(batch_of() | change)


@pytest.mark.parametrize("method", [topd.OPD, topd.TOPD])
@pytest.mark.parametrize("key", ["position_ids", "labels", "advantages"])
def test_keys_that_are_not_read_are_refused_by_name(method, key):
    student, teacher = models()
    with pytest.raises(
        ValueError, match=f"batch may hold input_ids, attention_mask, response_mask.*, got '{key}', which is not"
    ):
        method(student, teacher)(batch_of() | {key: torch.ones(3, 20)})


def test_bad_calls_are_refused():
    student, teacher = models()
    objective, batch = topd.OPD(student, teacher), batch_of()
    with pytest.raises(ValueError, match="batch must hold input_ids, attention_mask and response_mask, got no response_mask"):
        objective({key: batch[key] for key in ("input_ids", "attention_mask")})
    with pytest.raises(TypeError, match="batch must be a mapping of tensors, got list"):
        objective([1])
    for method in (topd.OPD, topd.TOPD):
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
            method(student, teacher)(batch, generator=3)
    with pytest.raises(ValueError, match=r"num_items must be finite and > 0, got 0; where a step may .* max\(num_items, 1\)"):
        objective(batch, num_items=0)
    with pytest.raises(ValueError, match=r"num_items must be finite and > 0, got 0; where a step may .* max\(num_items, 1\)"):
        objective(batch, num_items=torch.tensor(0))
    with pytest.raises(ValueError, match=r"num_items must be one number, got \[2\]"):
        objective(batch, num_items=torch.ones(2))
    with pytest.raises(TypeError, match=r"config must be a topd\.OPDConfig, got dict"):
        topd.OPD(student, teacher, {})
    with pytest.raises(TypeError, match=r"config must be a topd\.TOPDConfig, got OPDConfig"):
        topd.TOPD(student, teacher, topd.OPDConfig())
