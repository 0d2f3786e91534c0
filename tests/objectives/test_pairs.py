"""A teacher who reads another prompt before the same response: value, gradient and scores beside full logits in float64."""

import pytest
import torch
from compare import assert_near
from objective_cases import backward
from pair_cases import KEYS, LAYOUTS, batch_of, loss_of, models, plain_losses, reduced, rows_of

import topd
from topd.integrations.rollouts import pack_rollouts

# Table 13 of arXiv 2606.08432. The responses of a row and the teacher's prompts are data; with a reference, its OPSD column,
# one model is student and teacher.
TABLE = {
    "forward KL": topd.OPDConfig("forward_kl"),
    "clip": topd.OPDConfig("forward_kl", position_clip=0.1),
    "reverse KL": topd.OPDConfig(),
    "top-k": topd.OPDConfig(top_k=32),
    "TRD": topd.TRDConfig(),
    "TRD, eq. 6": topd.TRDConfig(reduction="sequence"),
}


CLIP_OF_OPSD = topd.OPDConfig("forward_kl", position_clip=0.06)


def objective_of(student, teacher, config):
    return (topd.TRD if isinstance(config, topd.TRDConfig) else topd.OPD)(student, teacher, config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reference", [False, True], ids=["OPD", "OPSD"])
@pytest.mark.parametrize("row", TABLE)
def test_every_row_of_table_13_equals_the_plain_formula(row, reference, layout):
    student, teacher = models()
    teacher = student if reference else teacher
    config, batch = CLIP_OF_OPSD if reference and row == "clip" else TABLE[row], batch_of(layout)
    step = objective_of(student, teacher, config)(batch)
    gradient = backward(student, step.loss)
    losses = plain_losses(student, teacher, batch, loss_of(config))
    expected = reduced(losses, config.reduction)
    assert_near(step.loss.detach(), expected.detach(), 1e-10, "loss")
    assert_near(gradient, backward(student, expected), 1e-10, "gradient")


@pytest.mark.parametrize(("config", "reference"), [(TABLE["clip"], False), (CLIP_OF_OPSD, True)], ids=["OPD", "OPSD"])
def test_the_clip_of_the_table_cuts_some_positions_and_they_pass_no_gradient(config, reference):
    student, teacher = models()
    batch, teacher = batch_of(), student if reference else teacher
    whole = topd.OPD(student, teacher, TABLE["forward KL"])(batch)
    above = whole.scores.forward_kl > config.position_clip
    assert 0 < above.sum() < batch["response_mask"].sum()
    step = topd.OPD(student, teacher, config)(batch)
    kept = topd.OPD(student, teacher, TABLE["forward KL"])(batch | {"token_weights": (~above).double()})
    share = above.sum().item() * config.position_clip / batch["response_mask"].sum().item()
    assert_near(step.loss.detach(), kept.loss.detach() + share, 1e-12)
    assert_near(backward(student, step.loss), backward(student, kept.loss), 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_stand_in_the_students_columns(layout):
    student, teacher = models()
    batch = batch_of(layout)
    scores = topd.OPD(student, teacher)(batch).scores
    inside = batch["response_mask"] > 0
    expected = plain_losses(student, teacher, batch, loss_of(topd.OPDConfig()))
    assert scores.reverse_kl.shape == scores.top1_agreement.shape == batch["input_ids"].shape
    assert_near(scores.reverse_kl[inside], torch.cat(expected).detach(), 1e-10)
    tokens = torch.cat([ids[places] for ids, places in rows_of(batch, "")])
    logprobs = plain_losses(student, teacher, batch, lambda s, t: t)
    assert_near(scores.teacher_logprob[inside], torch.cat(logprobs).gather(-1, tokens.unsqueeze(-1))[:, 0], 1e-10)
    assert (scores.reverse_kl[~inside] == 0).all()
    assert not scores.top1_agreement[~inside].any()


@pytest.mark.parametrize("layout", ["left", "gaps", "packed"])
@pytest.mark.parametrize(
    "config",
    [topd.OPDConfig(), topd.OPDConfig(topd.JSD(0.3), reduction="sequence", hard_weight=0.2), topd.OPDConfig(top_k=5)],
    ids=["reverse KL", "JSD", "top-k"],
)
def test_equal_contexts_give_the_loss_without_pairs(config, layout):
    student, teacher = models()
    batch = {key: value for key, value in batch_of(layout).items() if not key.startswith("teacher_")}
    plain = topd.OPD(student, teacher, config)(batch)
    gradient = backward(student, plain.loss)
    step = topd.OPD(student, teacher, config)(batch | {f"teacher_{key}": value for key, value in batch.items()})
    assert_near(step.loss.detach(), plain.loss.detach(), 1e-14)
    assert_near(backward(student, step.loss), gradient, 1e-13)
    assert_near(step.scores.forward_kl, plain.scores.forward_kl, 1e-13)
    for name in ("tokens", "student_entropy", "teacher_entropy", "opd_loss"):
        assert_near(step.metrics[name], plain.metrics[name].double(), 1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("layout", ["pair", "packed"])
def test_num_items_gives_the_gradient_of_the_larger_batch(layout, reduction):
    student, teacher = models()
    objective, batch = topd.TRD(student, teacher, topd.TRDConfig(reduction=reduction)), batch_of("pair")
    whole = backward(student, objective(batch).loss)
    items = batch["response_mask"].sum() if reduction == "token" else 3
    student.zero_grad()
    parts = []
    for b in range(4):
        part = {key: value[b : b + 1] for key, value in batch.items()}
        parts.append(objective(pack_rollouts(part) if layout == "packed" else part, num_items=items).loss)
    assert_near(backward(student, sum(parts)), whole, 1e-12)


@pytest.mark.parametrize("layout", ["pair", "packed"])
@pytest.mark.parametrize("config", [topd.TRDConfig(), topd.TRDConfig(top_k=3), topd.TRDConfig("jsd", top_k=3)], ids=str)
def test_no_response_and_no_row_give_zeros(config, layout):
    student, teacher = models()
    none = topd.pair([[1, 2], [3]], [[4], [5, 6]], [[], []], pad_token_id=0)
    empty = topd.pair([], [], [], pad_token_id=0)
    assert all(value.shape == (0, 0) for value in empty.values())
    for batch in (none, empty):
        given = pack_rollouts(batch) if layout == "packed" else batch
        step = topd.TRD(student, teacher, config)(given)
        student.zero_grad()
        step.loss.backward()
        assert step.loss == step.metrics["tokens"] == 0
        assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())
        assert step.scores.reverse_kl.shape == given["input_ids"].shape


def test_sides_of_other_widths_vocabularies_and_masks_of_bools():
    """The teacher has tokens that the student lacks, in its prompt alone."""
    from tiny_models import tiny

    student, teacher = models()[0], tiny("qwen3", seed=3, vocab_size=70, initializer_range=0.2).double()
    prompts, responses = [[1, 2]], [[5, 6, 7]]
    batch = topd.pair(prompts, [[69, 68, 3]], responses, pad_token_id=0)
    assert batch["attention_mask"].dtype == torch.bool
    step = topd.OPD(student, teacher, allow_unequal_vocabularies=True)(batch)
    assert step.loss > 0
    assert (step.scores.teacher_lost_mass[batch["response_mask"]] > 0).all()
    with pytest.raises(
        ValueError, match=r"teacher_input_ids must hold ids that every model can read, in \[0, 61\) for the teacher"
    ):
        topd.OPD(student, student)(batch)
    swapped = topd.pair([[69]], prompts, responses, pad_token_id=0)
    with pytest.raises(ValueError, match=r"input_ids must hold ids that every model can read, in \[0, 61\) for the student"):
        topd.OPD(student, teacher, allow_unequal_vocabularies=True)(swapped)


def test_a_batch_of_inference_mode_changes_nothing():
    student, teacher = models()
    expected = backward(student, topd.TRD(student, teacher)(batch_of()).loss)
    with torch.inference_mode():
        batch = {key: value.clone() for key, value in batch_of().items()}
    assert torch.equal(backward(student, topd.TRD(student, teacher)(batch).loss), expected)


def test_packing_keeps_pairs_weights_and_verdicts():
    batch = batch_of("gaps")
    weights = torch.rand(batch["input_ids"].shape)
    verdict = torch.tensor([True, False, True, True])
    packed = pack_rollouts(batch | {"token_weights": weights, "verdict": verdict})
    assert set(packed) == {
        *("input_ids", "response_mask", "cu_seqlens", "teacher_input_ids", "teacher_response_mask", "teacher_cu_seqlens"),
        *("token_weights", "verdict"),
    }
    assert torch.equal(packed["teacher_cu_seqlens"].diff().long(), batch["teacher_attention_mask"].sum(-1))
    kept = batch["teacher_attention_mask"] > 0
    assert torch.equal(packed["teacher_input_ids"], batch["teacher_input_ids"][kept])
    assert torch.equal(packed["teacher_response_mask"], batch["teacher_response_mask"][kept] > 0)
    assert torch.equal(packed["token_weights"], weights[batch["attention_mask"] > 0])
    assert torch.equal(packed["verdict"], verdict)
    assert KEYS[1] not in packed
