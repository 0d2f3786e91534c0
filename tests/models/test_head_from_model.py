"""Head.from_model: the model's own logits from its last hidden state, for tiny models of random weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_cases import (
    CAUSAL,
    SIZES,
    VISION,
    H,
    V,
    assert_same_logits,
    build,
    hidden_of,
    multimodal,
    of_the_newest,
    spread,
    token_ids,
)

import topd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.replace(" ", "-"))
def test_logits_are_the_models_own(case: str) -> None:
    model = build(*CAUSAL[case])
    head = assert_same_logits(model)
    assert head.weight.untyped_storage().data_ptr() == model.get_output_embeddings().weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("name", "text", "softcap", "expected"),
    [
        pytest.param(*("PaliGemma", "Gemma2", 2.0, 2.0), marks=of_the_newest),  # before, it leaves the softcap out
        ("PaliGemma", "Gemma", None, None),
        ("Gemma3", "Gemma3Text", 2.0, None),  # this class does not apply the softcap of its text config
    ],
)
def test_multimodal_softcap_is_what_the_class_applies(
    name: str, text: str, softcap: float | None, expected: float | None
) -> None:
    options = {} if softcap is None else {"final_logit_softcapping": softcap}
    assert assert_same_logits(multimodal(name, text, **options)).softcap == expected


def test_a_language_model_inside_a_model_brings_its_head() -> None:
    text = transformers.Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2).to_dict()
    vision = VISION | {"intermediate_size": 64, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(
        text_config=text, vision_config=transformers.Llama4VisionConfig(**vision).to_dict(), pad_token_id=0
    )
    model = spread(transformers.Llama4ForConditionalGeneration(config))
    with torch.no_grad():
        hidden = model.language_model.model(input_ids=token_ids()).last_hidden_state
    assert_same_logits(model, hidden)


def test_tensors_are_the_live_parameters() -> None:
    model = build("Phi", {})
    head = topd.Head.from_model(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias


def test_gradients_equal_autograd_through_the_model() -> None:
    model = build("Cohere", {"logit_scale": 0.0625})
    probe = torch.randn(2, 7, V)
    (model(input_ids=token_ids()).logits * probe).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (topd.Head.from_model(model).logits(hidden_of(model)) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)


def test_padding_rows_are_cut_by_a_view_that_carries_gradients() -> None:
    model = build(*CAUSAL["Inkling"])
    with torch.no_grad():
        head = topd.Head.from_model(model)
    assert head.weight.shape == (50, H)
    head.logits(torch.ones(1, H)).sum().backward()
    assert model.lm_head.weight.grad[:50].ne(0).all()
    assert model.lm_head.weight.grad[50:].eq(0).all()


def test_importing_it_imports_neither_transformers_nor_peft() -> None:
    imports = "import sys, topd.models.head_from_model, topd.integrations.rollouts"
    code = f"{imports}; print(sorted({{'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(topd.__file__).parents[1])},
    )
    assert done.stdout.strip() == "[]"
