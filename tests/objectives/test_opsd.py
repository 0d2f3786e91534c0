"""topd.OPSD: values and gradients of a model that teaches itself equal dense float64 ones, for each of its three teachers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from compare import assert_near, row_divergence
from objective_cases import backward
from pair_cases import batch_of, plain_losses, reduced
from self_teacher_cases import MILD, adapted, frozen, modes, plain, step
from tiny_models import checkpoint_activations, flat_gradient, tiny

import topd

DEFAULT = topd.ForwardKL(entry_clip=0.05)
KINDS = ("initial", "live", "ema")


def clipped(limit):
    return lambda s, t: row_divergence(topd.ForwardKL(), s, t).clamp(max=limit)


def on_top(k):
    def loss(s, t):
        ids = t.topk(k).indices
        return row_divergence(topd.ReverseKL(), *(each.gather(-1, ids).log_softmax(-1) for each in (s, t)))

    return loss


def rows(divergence):
    return lambda s, t: row_divergence(divergence, s, t)


# The rows of arXiv 2606.08432, Table 13, that read a reference, and OPSD's own.
ROWS = {
    "OPSD": ({}, rows(DEFAULT)),
    "forward KL": ({"divergence": "forward_kl"}, rows(topd.ForwardKL())),
    "clip": ({"divergence": "forward_kl", "position_clip": 0.06}, clipped(0.06)),
    "reverse KL": ({"divergence": "reverse_kl"}, rows(topd.ReverseKL())),
    "top-k": ({"divergence": "reverse_kl", "top_k": 32}, on_top(32)),
}


def assert_as_dense(objective, dense, batch, divergence, temperature=1.0):
    """Check loss, gradient and scores beside full logits of the student and of a teacher that holds what should teach."""
    student, reduction = objective.student, objective.config.reduction
    result = objective(batch)
    gradient = backward(student, result.loss)
    losses = plain_losses(student, dense, batch, divergence, temperature)
    expected = reduced(losses, reduction)
    assert_near(result.loss.detach(), expected.detach(), 1e-10, "loss")
    assert_near(gradient, backward(student, expected), 1e-10, "gradient")
    kl = plain_losses(student, dense, batch, rows(topd.ReverseKL()), temperature)
    assert_near(result.scores.reverse_kl[batch["response_mask"]], torch.cat(kl).detach(), 1e-10, "scores")
    student.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [plain, adapted], ids=["plain", "LoRA"])
def test_each_teacher_equals_dense_after_each_step(build, kind):
    student = build().train()
    dense = frozen(student)
    options = {"ema_decay": 0.7} if kind == "ema" else {}
    objective = topd.OPSD(student, topd.OPSDConfig(teacher=kind, temperature=0.8, reduction="sequence", **options))
    for number in range(3):
        assert_as_dense(objective, dense, batch_of(seed=number), rows(DEFAULT), 0.8)
        step(student, number)
        objective.after_step()
        for teaching, own in zip(dense.parameters(), student.parameters(), strict=True):
            if kind == "live":
                teaching.data.copy_(own.data)
            elif kind == "ema":
                teaching.data = 0.7 * teaching + 0.3 * own.detach()


@pytest.mark.parametrize("options", ROWS)
def test_the_rows_of_the_papers_table(options):
    given, divergence = ROWS[options]
    student = adapted()
    dense, objective = frozen(student), topd.OPSD(student, topd.OPSDConfig(**given))
    step(student, size=0.2)
    assert_as_dense(objective, dense, batch_of(), divergence)


def test_defaults():
    config = topd.OPSD(plain()).config
    assert (config.divergence, config.temperature, config.reduction) == (DEFAULT, 1.0, "token")
    assert (config.teacher, config.ema_decay) == ("initial", 0.999)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind):
    student, batch = adapted(), {key: value.repeat(2, 1) for key, value in batch_of().items()}
    objective = topd.OPSD(student, topd.OPSDConfig(teacher=kind))
    step(student)
    objective.after_step()
    whole = backward(student, objective(batch).loss)
    student.zero_grad()
    for row in range(8):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        objective(part, num_items=batch["response_mask"].sum()).loss.backward()
    assert_near(flat_gradient(student), whole, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [plain, adapted], ids=["plain", "LoRA"])
def test_dropout_is_the_students_alone_and_modes_come_back(build, kind):
    base = plain(attention_dropout=0.5)
    student = (adapted(["q_proj"], base=base, lora_dropout=0.5) if build is adapted else base).train()
    student.get_input_embeddings().eval()
    objective, batch, training = topd.OPSD(student, topd.OPSDConfig(teacher=kind)), batch_of(), modes(student)
    first, second = objective(batch).scores, objective(batch).scores
    assert modes(student) == training
    assert torch.equal(first.teacher_logprob, second.teacher_logprob)
    assert not torch.equal(first.student_logprob, second.student_logprob)
    broken = student.get_input_embeddings().register_forward_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        objective(batch)
    broken.remove()
    assert modes(student) == training
    assert torch.equal(objective(batch).scores.teacher_logprob, first.teacher_logprob)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_the_adapter_off_the_teacher_stays_bit_for_bit(checkpointed, autocast):
    """Through three optimizer steps, over a base in bfloat16."""
    student = adapted(["q_proj", "down_proj"], base=tiny("llama", **MILD).bfloat16(), modules_to_save=["lm_head"]).train()
    if checkpointed:
        checkpoint_activations(student.get_base_model())
    objective, batch = topd.OPSD(student), batch_of()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.02)
    scores = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            result = objective(batch)
        scores.append(result.scores)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert not torch.equal(scores[0].student_logprob, scores[3].student_logprob)
    for each in scores:
        assert torch.equal(each.teacher_logprob, scores[0].teacher_logprob)
        assert torch.equal(each.teacher_entropy, scores[0].teacher_entropy)


def test_a_batch_without_the_teachers_prompts_is_refused():
    batch = {key: value for key, value in batch_of().items() if not key.startswith("teacher_")}
    with pytest.raises(ValueError, match=r"batch must hold teacher_input_ids, since the teacher of topd\.OPSD reads another"):
        topd.OPSD(plain())(batch)


def test_another_methods_config_is_refused_before_anything_is_copied():
    with pytest.raises(TypeError, match=r"config must be a topd\.OPSDConfig, got OPDConfig; topd\.OPD takes that one"):
        topd.OPSD(plain(), topd.OPDConfig())


@pytest.mark.parametrize("method", [topd.OPD, topd.TOPD, topd.TRD])
def test_methods_that_keep_nothing_have_an_empty_state(method):
    objective = method(plain(), tiny("qwen3", seed=3, **MILD).double())
    objective.after_step()
    assert objective.state_dict() == {}
    objective.load_state_dict({})
    with pytest.raises(
        ValueError, match="got one with 'initial'; take the configuration with which the checkpoint was written"
    ):
        objective.load_state_dict(topd.OPSD(plain()).state_dict())


def test_a_state_goes_on_where_the_other_stopped():
    student = adapted()
    objective = topd.OPSD(student, topd.OPSDConfig(teacher="ema", ema_decay=0.5))
    other = copy.deepcopy(student)
    for number in range(2):
        step(student, number)
        objective.after_step()
    resumed = topd.OPSD(other, topd.OPSDConfig(teacher="ema", ema_decay=0.5))
    other.load_state_dict(student.state_dict())
    resumed.load_state_dict(objective.state_dict())
    for each in (objective, resumed):
        step(each.student, 5)
        each.after_step()
    losses = [each(batch_of()).loss for each in (objective, resumed)]
    assert torch.equal(*losses)
    assert losses[0] != 0
