"""TOPDTrainer: TRL's loss and ours are one for OPD, TRL's rollouts and logs stay, TOPD trains, what clashes is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from compare import assert_near
from smollm2_cases import needs_model
from tiny_trl_cases import inputs_with_a_tools_output
from trainer_cases import LOGGED
from trl_cases import arguments, student, teacher_and_tokenizer, trainer_of

import topd
from topd.integrations.tokenizers import check_same_tokenizer, tokenizer_in_folder
from topd.integrations.trl import TOPDTrainer, divergence_of, resolve_config, to_batch

trl = pytest.importorskip("trl")

datasets = pytest.importorskip("datasets")


class Both(TOPDTrainer):
    """Every loss computed twice, by TRL and by topd, each with a gradient of it; topd's is trained on."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        runs, weight = [], unwrapped_student.model.layers[0].mlp.up_proj.weight
        for way in (trl.DistillationTrainer._compute_loss, TOPDTrainer._compute_loss):
            loss, entropy, count = way(self, unwrapped_student, inputs, num_items_in_batch)
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            runs.append((loss.item(), entropy.item(), int(count), gradient))
        self.seen = [*getattr(self, "seen", []), runs]
        return loss, entropy, count


@needs_model
@pytest.mark.parametrize(("beta", "steps", "accumulated"), [(1.0, 3, 1), (0.3, 1, 2)])
def test_trls_own_loss_is_ours(tmp_path, beta, steps, accumulated):
    """Reverse KL over three steps; a JSD under gradient accumulation."""
    config = topd.OPDConfig(divergence=divergence_of(beta))
    options = {"max_steps": steps, "gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2 // accumulated}
    trainer = trainer_of(Both, tmp_path, config, beta=beta, **options)
    trainer.train()
    assert len(trainer.seen) == steps * accumulated
    for (theirs, their_entropy, count, gradient), (ours, entropy, own_count, own_gradient) in trainer.seen:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert entropy == pytest.approx(their_entropy, rel=1e-4)
        assert own_count == count > 0
        assert_near(own_gradient, gradient.double(), 1e-3, "gradient")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == steps
    expected = {"entropy", "opd_loss", "teacher_entropy", "seconds_divergence", "num_tokens"}
    assert all(expected <= line.keys() for line in lines)
    assert all(line["opd_loss"] == pytest.approx(line["loss"], rel=1e-4, abs=LOGGED["abs"]) for line in lines)


@needs_model
def test_topd_trains_and_evaluates(tmp_path):
    config = topd.TOPDConfig(candidates="top_k", candidate_value=2, horizon=4, guidance_weight=1.0)
    trainer = trainer_of(TOPDTrainer, tmp_path, config, max_steps=1, gradient_accumulation_steps=2, log_completions=True)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["candidates"] == 4
    assert line["loss"] == pytest.approx(line["opd_loss"] + line["guidance_loss"], rel=1e-4, abs=LOGGED["abs"])
    assert line["guidance_loss"] > 0
    assert not torch.equal(before, trainer.model.model.layers[0].mlp.up_proj.weight)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert trainer.state.log_history[-1]["eval_candidates"] > 0


@needs_model
def test_the_default_configuration_follows_trls_arguments(tmp_path):
    trainer = trainer_of(TOPDTrainer, tmp_path, beta=0.0, temperature=0.8)
    expected = topd.TOPDConfig(divergence=topd.ForwardKL(), temperature=0.8, window_temperature=0.8)
    assert trainer.objective_config == expected


@needs_model
def test_a_real_tokenizer_is_compared(tmp_path):
    """SmolLM2's 49,152 tokens: with itself, with one that has a token more, with one whose added token is another."""
    tokenizer = teacher_and_tokenizer()[1]
    thinking, seeing = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>"])
    seeing.add_tokens(["<image>"])
    check_same_tokenizer(tokenizer, thinking)
    message = "at 1 of 49,153 ids: 49152 is '<think>' of the student and '<image>' of the teacher"
    with pytest.raises(ValueError, match=message):
        check_same_tokenizer(thinking, seeing)
    seeing.save_pretrained(tmp_path)
    teacher = SimpleNamespace(config=SimpleNamespace(name_or_path=str(tmp_path)))
    assert tokenizer_in_folder(teacher).get_vocab() == seeing.get_vocab()
    with pytest.raises(ValueError, match=message):
        trainer_of(TOPDTrainer, tmp_path, teacher_processing_class=seeing, processing_class=thinking)


@needs_model
def test_no_teacher_and_other_configurations_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"objective_config must be a topd\.OPDConfig, TOPDConfig, .* or None, got dict"):
        trainer_of(TOPDTrainer, tmp_path, {})
    with pytest.raises(ValueError, match="teacher_model must be a model or its name, got None"):
        TOPDTrainer(student(), args=arguments(tmp_path), processing_class=teacher_and_tokenizer()[1])


def test_beta_names_a_divergence():
    assert [divergence_of(beta) for beta in (0.0, 0.3, 1.0)] == [topd.ForwardKL(), topd.JSD(0.3), topd.ReverseKL()]


@pytest.mark.parametrize(
    ("config", "beta", "temperature", "message"),
    [
        (
            topd.OPDConfig(),
            0.5,
            1.0,
            r"objective_config.divergence must be the one of args.beta = 0.5, JSD\(beta=0.5\), got Rev",
        ),
        (topd.OPDConfig(temperature=0.7), 1.0, 1.0, "objective_config.temperature must be args.temperature, .* 1.0, got 0.7"),
        (topd.TOPDConfig(), 1.0, 0.7, "objective_config.temperature must be args.temperature, .* 0.7, got 1.0; give both"),
        (topd.OPDConfig(reduction="sequence"), 1.0, 1.0, "objective_config.reduction must be 'token', .* got 'sequence'"),
    ],
)
def test_a_configuration_that_contradicts_the_arguments_is_refused(config, beta, temperature, message):
    with pytest.raises(ValueError, match=message):
        resolve_config(config, beta, temperature)


def test_a_configuration_that_agrees_is_taken():
    for config, beta in ((topd.OPDConfig("forward_kl"), 0.0), (topd.OPDConfig("total_variation"), 1.0)):
        assert resolve_config(config, beta, 1.0) is config


def test_what_tools_wrote_is_attended_but_no_response():
    inputs = inputs_with_a_tools_output()
    batch = to_batch(inputs)
    assert batch["input_ids"].tolist() == [[0, 5, 7, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 0]]
    assert batch["response_mask"].tolist() == [[0, 0, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match="inputs must be text alone, got pixel_values"):
        to_batch(inputs | {"pixel_values": torch.zeros(1)})
