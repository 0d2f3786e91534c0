"""DistillationTrainer: the large batch's step under accumulation and DDP, its rollouts, logs, evaluation and refusals."""

import re

import pytest
import torch
from compare import assert_near
from diagnostics_cases import diagnostics_of, numbers
from tiny_models import tiny
from trainer_cases import (
    FEW,
    GATED,
    LOGGED,
    LR,
    MEASURED,
    MILD,
    InOrder,
    after_one_step,
    arguments,
    eight_pairs,
    flat,
    four_rollouts,
    models,
    prompts,
    rows_of,
)
from two_ranks import start

import topd
from topd.integrations.rollouts import pack_rollouts, sample_rollouts
from topd.integrations.transformers import DistillationTrainer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_step_of_two_micro_batches_is_the_large_batchs(tmp_path, reduction):
    objective, batch = topd.OPD(*models(), topd.OPDConfig(reduction=reduction)), four_rollouts()
    expected, loss = after_one_step(objective, batch)
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch))
    trainer.train()
    assert_near(flat(objective.student), expected, 1e-9)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, **LOGGED)
    assert logged["opd_loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["tokens"] == batch["response_mask"].sum() / 2
    assert logged["seconds_divergence"] > 0


def test_rollouts_are_sampled_for_the_whole_step_and_counted(tmp_path):
    student, teacher = models()
    student.generation_config.eos_token_id = list(range(0, 61, 4))
    objective, batch = topd.OPD(student, teacher), prompts()
    greedy = {"max_new_tokens": 9, "temperature": 0.0}
    rollouts = sample_rollouts(student, **batch, **greedy)
    assert len(set(rollouts["response_mask"].sum(-1).tolist())) > 1
    expected, _ = after_one_step(objective, rollouts)
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch), rollout=greedy)
    trainer.train()
    assert_near(flat(student), expected, 1e-9)


def test_rollouts_may_come_from_a_function_and_batches_be_packed(tmp_path):
    objective, batch = topd.OPD(*models(), topd.OPDConfig(reduction="sequence")), four_rollouts()
    expected, _ = after_one_step(objective, batch)

    def pack(student, given):
        assert student is objective.student
        return pack_rollouts(given | {"response_mask": given["finished"]})

    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    rows = [row | {"finished": row.pop("response_mask")} for row in rows_of(batch)]
    DistillationTrainer(objective, arguments(tmp_path), collate, train_dataset=rows, rollout=pack).train()
    assert_near(flat(objective.student), expected, 1e-9)


def test_topd_gates_within_each_micro_batch(tmp_path):
    student, teacher = models()
    objective = topd.TOPD(student, teacher, topd.TOPDConfig(window_temperature=0.0, **FEW))
    batch = four_rollouts()
    items, parts = batch["response_mask"].sum(), [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    student.zero_grad()
    for part in parts:
        objective(part, num_items=items).loss.backward()
    expected = torch.cat([(p - LR * p.grad).detach().reshape(-1) for p in student.parameters()])
    student.zero_grad()
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=InOrder(rows_of(batch)))
    trainer.train()
    assert_near(flat(student), expected, 1e-9)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["opd_loss"] + 0.1 * logged["guidance_loss"], **LOGGED)
    assert logged["candidates"] > 0


def test_evaluation_samples_its_own_rollouts_and_leaves_no_gradient(tmp_path):
    student, teacher = models()
    teacher.train()
    objective, batch = topd.OPD(student, teacher), prompts()
    greedy = {"max_new_tokens": 5, "temperature": 0.0}
    options = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = DistillationTrainer(objective, options, eval_dataset=rows_of(batch), rollout=greedy)
    assert not teacher.training
    metrics = trainer.evaluate()
    expected = objective(sample_rollouts(student, **batch, **greedy))
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["eval_opd_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["eval_tokens"] == 20
    assert trainer.state.log_history[-1]["eval_teacher_entropy"] > 0
    assert "test_opd_loss" in trainer.evaluate(metric_key_prefix="test")
    assert all(parameter.grad is None for parameter in student.parameters())


def test_logs_are_means_since_the_last_one(tmp_path):
    objective = topd.OPD(*models())
    trainer = DistillationTrainer(
        objective, arguments(tmp_path, max_steps=4, logging_steps=2), train_dataset=rows_of(four_rollouts())
    )
    trainer.train()
    first, second, summary = trainer.state.log_history
    assert first["opd_loss"] == pytest.approx(first["loss"], **LOGGED)
    assert second["opd_loss"] == pytest.approx(second["loss"], **LOGGED)
    assert second["loss"] < first["loss"]
    assert "opd_loss" not in summary


def test_bfloat16_by_autocast(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which TrainingArguments of transformers 4 sets for ever,
    student, teacher = tiny("llama", **MILD), tiny("qwen3", seed=3, **MILD)
    objective, dtypes = topd.OPD(student, teacher), []
    student.model.layers[0].mlp.register_forward_hook(lambda *given: dtypes.append(given[-1].dtype))
    options = arguments(tmp_path, bf16=True)
    trainer = DistillationTrainer(objective, options, train_dataset=rows_of(prompts()), rollout={"max_new_tokens": 3})
    trainer.train()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # and which this keeps
    assert set(dtypes) == {torch.bfloat16}
    assert 0 < trainer.state.log_history[0]["loss"] < 20


def test_no_column_is_dropped_and_the_callers_arguments_stay(tmp_path):
    datasets = pytest.importorskip("datasets")
    options = arguments(tmp_path)
    rows = datasets.Dataset.from_dict({key: value.tolist() for key, value in four_rollouts().items()})
    trainer = DistillationTrainer(topd.OPD(*models()), options, train_dataset=rows)
    assert "response_mask" in next(iter(trainer.get_train_dataloader()))
    assert options.remove_unused_columns


def test_two_processes_take_the_large_batchs_step(tmp_path):
    """DDP over gloo, two micro-batches in each; only the whole batch's 26 tokens make every token weigh the same. Then pairs of
    student and teacher, four micro-batches in each; and TOPD, whose gate judges the candidates of both."""
    objective, batch = topd.OPD(*models()), four_rollouts()
    expected, loss = after_one_step(objective, batch)
    gradient = (flat(objective.student) - expected) / LR
    trd = topd.TRD(*models(), topd.TRDConfig(**MEASURED))
    diagnostics, (after_pairs, _) = numbers(trd(eight_pairs()).totals.metrics()), after_one_step(trd, eight_pairs())
    after_topd, _ = after_one_step(gated := topd.TOPD(*models(), GATED), four_rollouts())
    guidance = gated(four_rollouts()).metrics["guidance_loss"].item()
    ranks = start("integrations/two_processes.py", tmp_path, timeout=180)
    for each in ranks:
        assert_near(each["parameters"], expected, 1e-9)
        assert_near(each["pairs"], after_pairs, 1e-8, "pairs")
        assert_near(each["topd"], after_topd, 1e-9, "TOPD")
        assert each["topd_log"]["guidance_loss"] == pytest.approx(guidance, rel=1e-5)
        assert diagnostics_of(each["pairs_log"]) == pytest.approx(diagnostics, rel=1e-9)
        assert_near(each["accelerate_gradient"], gradient, 1e-9, "under accelerate")
        assert each["log"]["loss"] == pytest.approx(loss, **LOGGED)
        assert each["log"]["opd_loss"] == pytest.approx(loss, rel=1e-5)
    assert not torch.equal(ranks[0]["draws"], ranks[1]["draws"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": 3}, TypeError, r"objective must be a topd\.OPD or topd\.TOPD, got int"),
        ({"rollout": 3}, TypeError, "rollout must be options of sample_rollouts, a function or None, got int"),
        ({"rollout": {"temperature": 1.0}}, ValueError, "rollout must hold max_new_tokens"),
        ({"rollout": {"max_new_tokens": 3, "min_p": 0.5}}, ValueError, "rollout must hold max_new_tokens and may hold .*top_k"),
        ({"lmbda": 1.5}, ValueError, "lmbda must be finite and >= 0 and <= 1, got 1.5; None to take batches as they come"),
        ({"lmbda": 0.5}, ValueError, "rollout must be given where lmbda is above 0, got lmbda=0.5 and no rollout"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "model must be left out, got one; the objective's student is the model"),
        ({"compute_loss_func": print}, ValueError, "compute_loss_func must be left out"),
        ({"compute_metrics": print}, ValueError, "compute_metrics must be left out"),
        ({"model_init": print}, ValueError, "model_init must be left out"),
        ({"args": {"label_smoothing_factor": 0.1}}, ValueError, "args.label_smoothing_factor must be left out"),
        ({"args": {"torch_compile": True}}, ValueError, "args.torch_compile must be left out"),
        ({"args": {"use_liger_kernel": True}}, ValueError, "args.use_liger_kernel must be left out"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, change, error, message):
    given = {"objective": topd.OPD(*models())} | change | {"args": arguments(tmp_path, **change.get("args", {}))}
    with pytest.raises(error, match=message):
        DistillationTrainer(**given)


def test_several_devices_in_one_process_are_refused(tmp_path):
    options = arguments(tmp_path)
    options._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"one device a process, got 2 devices in one \(nn\.DataParallel\); start it with torchrun"
    ):
        DistillationTrainer(topd.OPD(*models()), options)


@pytest.mark.parametrize(
    ("keys", "rollout", "message"),
    [
        (["input_ids"], {"max_new_tokens": 2}, "a batch must hold input_ids and attention_mask, got no attention_mask"),
        (["input_ids", "attention_mask"], None, "a batch must hold response_mask where rollout is None"),
        (["input_ids", "attention_mask"], lambda student, batch: batch, "rollout must return a batch with response_mask, got"),
        (["input_ids", "attention_mask"], lambda student, batch: None, "rollout must return .* got NoneType"),
    ],
)
def test_batches_without_their_masks_are_refused(tmp_path, keys, rollout, message):
    rows = [{key: row[key] for key in keys} for row in rows_of(prompts())]
    trainer = DistillationTrainer(topd.OPD(*models()), arguments(tmp_path), train_dataset=rows, rollout=rollout)
    with pytest.raises(ValueError, match=re.compile(message)):
        trainer.train()


def test_collators_make_mappings(tmp_path):
    trainer = DistillationTrainer(topd.OPD(*models()), arguments(tmp_path), list, train_dataset=rows_of(prompts()))
    with pytest.raises(TypeError, match="data_collator must make mappings of tensors, got list"):
        trainer.train()
