"""PEFT's LoRA on the student's layers and on lm_head: gradients as autograd has them, the base weights untouched."""

import pytest
import torch
from compare import assert_near, row_divergence
from objective_cases import batch_of
from tiny_models import tiny
from trainer_cases import arguments, four_rollouts, prompts, rows_of

import topd
from topd.integrations.transformers import DistillationTrainer

peft = pytest.importorskip("peft")
MILD = {"initializer_range": 0.2}
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


def adapted(targets=TARGETS, **options):
    """A float64 student whose adapters are not born zero."""
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(tiny("llama", **MILD).double(), config).double()


def teacher():
    return tiny("qwen3", seed=3, **MILD).double()


def eager_loss(student, teacher_model, batch, divergence):
    """The mean over response tokens, from the full logits of the model's own forward."""
    response = batch["response_mask"][:, 1:] > 0
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": position_ids}
    logprobs = [model(**given).logits[:, :-1].log_softmax(-1)[response] for model in (student, teacher_model)]
    return row_divergence(divergence, logprobs[0], logprobs[1].detach()).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("divergence", [topd.ReverseKL(), topd.JSD(0.3)], ids=str)
def test_gradients_of_every_adapter_are_autograds(divergence):
    student, teacher_model, batch = adapted(), teacher(), batch_of()
    grads = gradients(student, topd.OPD(student, teacher_model, topd.OPDConfig(divergence))(batch).loss)
    expected = gradients(student, eager_loss(student, teacher_model, batch, divergence))
    assert grads.keys() == expected.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in grads)
    assert sum("lm_head" in name for name in grads) == 2
    assert sum("layers" in name for name in grads) == 2 * 3 * 3
    for name, gradient in grads.items():
        assert gradient.abs().max() > 0
        assert_near(gradient, expected[name], 1e-8, name)


def test_a_step_moves_the_adapters_alone(tmp_path):
    """Through the trainer, on its own rollouts: no base weight has a gradient, none changes by a bit."""
    student = adapted()
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    assert not before["base_model.model.lm_head.base_layer.weight"].requires_grad
    objective = topd.TOPD(student, teacher(), topd.TOPDConfig(candidates="top_k", candidate_value=1, horizon=3))
    rollout = {"max_new_tokens": 5}
    DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(prompts()), rollout=rollout).train()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
        assert parameter.grad is None


def test_accumulation_is_the_large_batchs_with_adapters_too(tmp_path):
    student, batch = adapted(), four_rollouts()
    objective = topd.OPD(student, teacher())
    expected = {name: -0.5 * gradient for name, gradient in gradients(student, objective(batch).loss).items()}
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch)).train()
    for name, parameter in student.named_parameters():
        if name in expected:
            assert_near(parameter.detach() - before[name], expected[name], 1e-6, name)


def test_an_adapter_that_is_off_is_not_in_the_loss():
    student, base, batch = adapted(), tiny("llama", **MILD).double(), batch_of()
    assert topd.OPD(student, base)(batch).loss > 1e-3
    with student.disable_adapter():
        assert 0 <= topd.OPD(student, base)(batch).loss < 1e-12


def test_dropout_on_the_heads_adapter_is_refused_and_says_what_to_do():
    student = adapted(lora_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"lora_dropout = 0.1 while training .* set lora_dropout=0 or leave lm_head out"):
        topd.OPD(student, teacher())(batch_of())
    layers = adapted(["q_proj", "v_proj"], lora_dropout=0.1).train()
    assert gradients(layers, topd.OPD(layers, teacher())(batch_of()).loss)
