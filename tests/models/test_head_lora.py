"""Head.from_model under PEFT: LoRA on the head, never merged, and the adapters that are refused."""

from typing import Any

import pytest
import torch
from head_cases import (
    CAUSAL,
    H,
    V,
    assert_same_as_wrapped,
    assert_same_logits,
    build,
    hidden_of,
    llama,
    lora,
    spread,
    token_ids,
)
from torch import nn

import topd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["Llama untied", "Phi bias", "Granite", "Gemma2", "FalconH1"])
def test_lora_on_the_head(name: str, rslora: bool) -> None:
    model = lora(build(*CAUSAL[name]), use_rslora=rslora)
    head = assert_same_as_wrapped(model)
    layer = model.get_base_model().lm_head
    assert head.adapter is not None
    assert head.adapter.a is layer.lora_A["default"].weight
    assert head.adapter.b is layer.lora_B["default"].weight
    assert head.weight is layer.base_layer.weight


def test_lora_gradients_equal_autograd_through_the_model() -> None:
    model = lora(build("Granite", {"logits_scaling": 8.0}))
    probe = torch.randn(2, 7, V)
    (model(input_ids=token_ids()).logits * probe).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in trained.items()}
    assert sum("lm_head.lora_" in name and grad.abs().max() > 1e-3 for name, grad in expected.items()) == 2
    model.zero_grad()
    (topd.Head.from_model(model).logits(hidden_of(model.get_base_model())) * probe).sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
    assert model.get_base_model().lm_head.base_layer.weight.grad is None


def test_merged_disabled_and_absent_adapters_leave_a_plain_head() -> None:
    model = lora()
    with model.disable_adapter():
        assert assert_same_as_wrapped(model).adapter is None
    model.merge_adapter()
    assert assert_same_as_wrapped(model).adapter is None
    model.unmerge_adapter()
    assert assert_same_as_wrapped(model).adapter is not None
    assert assert_same_as_wrapped(lora(target_modules=["q_proj"])).adapter is None
    assert assert_same_logits(lora().merge_and_unload()).adapter is None


def test_only_the_active_adapter_on_the_head_counts() -> None:
    model = lora(name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]))
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    spread(model)
    model.set_adapter("second")
    adapter = assert_same_as_wrapped(model).adapter
    assert adapter is not None
    assert adapter.a.shape == (2, H)
    model.base_model.set_adapter(["second", "third"])
    assert assert_same_as_wrapped(model).adapter is not None
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=r"2 active adapters, \['first', 'second'\] in LlamaForCausalLM; activate one"):
        topd.Head.from_model(model)


def test_modules_to_save_gives_its_active_copy() -> None:
    model = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    assert assert_same_as_wrapped(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert assert_same_as_wrapped(model).weight is wrapper.original_module.weight


def test_dropout_is_refused_while_training_only() -> None:
    model = lora(lora_dropout=0.1)
    assert assert_same_as_wrapped(model).adapter is not None
    with pytest.raises(ValueError, match=r"lora_dropout = 0.1 while training in adapter 'default' in LlamaForCausalLM"):
        topd.Head.from_model(model.train())


def test_lora_through_the_models_own_add_adapter() -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["lm_head"]))
    assert assert_same_logits(spread(model)).adapter is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"got DoRA in adapter 'default' in LlamaForCausalLM; merge the adapter"),
        ({"alora_invocation_tokens": [5]}, r"got the variant ALora\w+ in adapter 'default' in LlamaForCausalLM; merge"),
        ({"lora_bias": True}, r"got lora_bias in adapter 'default' in LlamaForCausalLM; set lora_bias=False"),
    ],
)
def test_lora_of_another_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topd.Head.from_model(lora(**options))


def test_disabled_and_still_merged_is_refused() -> None:
    model = lora()
    model.merge_adapter()
    layer = model.get_base_model().lm_head
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match=r"disabled and still merged in LlamaForCausalLM; call model.unmerge_adapter"):
        topd.Head.from_model(model)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (
            lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
            r"PEFT's peft.tuners.ia3.layer.Linear",
        ),
        (lambda: peft.LoHaConfig(target_modules=["lm_head"], r=2), r"PEFT's peft.tuners.loha.layer.Linear"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 4]}),
            r"PEFT's TrainableTokensWrapper",
        ),
    ],
)
def test_other_adapters_on_the_head_are_refused(config: Any, kind: str) -> None:
    model = peft.get_peft_model(llama(), config())
    with pytest.raises(ValueError, match=kind + r" in LlamaForCausalLM; merge or disable the adapter"):
        topd.Head.from_model(model)


def test_a_sharded_adapter_is_refused() -> None:
    model = lora()
    model.get_base_model().lm_head.lora_B["default"].weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"the whole lora_B of its head .* got shape \[0\]"):
        topd.Head.from_model(model)
