"""Head.from_model checks that the model's own forward makes its logits as the head does, and runs no layer for it."""

import copy
import gc
from typing import Any

import pytest
import torch
from head_cases import CAUSAL, H, V, build, llama, lora, multimodal
from torch import Tensor, nn

import topd
from topd.models import verify_head

transformers = pytest.importorskip("transformers")

DIFFERS = r"must compute its logits from last_hidden_state as its head does, got a logit of \S+ where the head gives \S+ in "


class Llama(transformers.LlamaForCausalLM):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        output = super().forward(*args, **kwargs)
        output.logits = self.changed(output.logits)
        return output

    def changed(self, logits: Tensor) -> Tensor:
        return logits


class Halved(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits / 2


class Capped(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return 30 * torch.tanh(logits / 30)


class Suppressed(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([V - 1]), -1e4)


class Cut(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits[..., : V - 1]


class Normalised(Llama):
    """Its forward does something between the base model and the head."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        states = self.model(input_ids, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(nn.functional.normalize(states, dim=-1)))


def of_class(kind: type, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = kind(llama().config).eval()
    model.load_state_dict(llama().state_dict())
    return model.to(dtype)


@pytest.mark.parametrize("kind", [Halved, Capped, Suppressed, Normalised])
def test_a_subclass_that_changes_its_logits_is_refused(kind: type) -> None:
    model = of_class(kind)
    with pytest.raises(ValueError, match=DIFFERS + rf"{kind.__name__}; build topd.Head\(.*or pass verify=False"):
        topd.Head.from_model(model)
    assert topd.Head.from_model(model, verify=False).weight is model.lm_head.weight


def test_the_message_says_both_logits() -> None:
    """Halved: the reported logit is half of the head's."""
    with pytest.raises(ValueError, match=DIFFERS) as caught:
        topd.Head.from_model(of_class(Halved))
    words = str(caught.value).split()
    came, head = float(words[words.index("of") + 1]), float(words[words.index("gives") + 1])
    assert came == pytest.approx(head / 2, rel=1e-4)


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"got logits \[1, 3, {V - 1}\] where the head gives \[1, 3, {V}\] in Cut; build"):
        topd.Head.from_model(of_class(Cut))


def test_a_subclass_that_changes_nothing_passes_and_is_looked_at_once() -> None:
    Llama.calls = 0
    model = of_class(Llama)
    for _ in range(3):
        topd.Head.from_model(model)
    assert Llama.calls == 1
    topd.Head.from_model(copy.deepcopy(model))
    assert Llama.calls == 2
    model.lm_head.bias = nn.Parameter(torch.ones(V))  # the head is another one now
    topd.Head.from_model(model)
    assert Llama.calls == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama tied", "Phi bias", "Gemma2", "Granite", "GraniteMoe", "Cohere", "FalconH1", "Inkling"])
def test_rounding_of_the_models_dtype_is_no_difference(name: str, dtype: torch.dtype) -> None:
    model = build(*CAUSAL[name]).to(dtype)
    head = topd.Head.from_model(model)
    assert head.weight.dtype == dtype
    assert model in verify_head._verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_beyond_rounding_is_seen_in_16_bits(dtype: torch.dtype) -> None:
    for kind in (Halved, Capped, Normalised):
        with pytest.raises(ValueError, match=DIFFERS):
            topd.Head.from_model(of_class(kind, dtype))


def test_a_tenth_is_seen_in_bfloat16() -> None:
    class Tenth(Llama):
        def changed(self, logits: Tensor) -> Tensor:
            return logits * 1.1

    with pytest.raises(ValueError, match=DIFFERS):
        topd.Head.from_model(of_class(Tenth, torch.bfloat16))


def test_a_bias_of_minus_infinity_hides_nothing() -> None:
    """-inf at one token in the model and in the head agrees; the other tokens are still compared."""
    for kind, refused in ((Llama, False), (Halved, True)):
        model = of_class(kind)
        model.lm_head.bias = nn.Parameter(torch.zeros(V).index_fill(0, torch.tensor([5]), -torch.inf))
        if refused:
            with pytest.raises(ValueError, match=DIFFERS):
                topd.Head.from_model(model)
        else:
            assert topd.Head.from_model(model).bias is model.lm_head.bias


# Nothing runs, nothing changes


def refuse_to_run(*_: Any) -> None:
    raise AssertionError("a module ran")


@pytest.mark.parametrize("name", ["Llama untied", "OPT", "Mamba", "GraniteMoe", "Gemma2"])
def test_no_module_runs_and_nothing_of_the_model_changes(name: str) -> None:
    model = build(*CAUSAL[name]).train()
    handles = [part.register_forward_pre_hook(refuse_to_run) for part in model.modules()]
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {part: (part.training, dict(vars(part)), dict(part._modules)) for part in model.modules()}
    random = torch.get_rng_state()
    head = topd.Head.from_model(model)
    assert model in verify_head._verified
    assert torch.equal(torch.get_rng_state(), random)
    for part, (training, attributes, children) in before.items():
        assert part.training == training
        assert vars(part).keys() == attributes.keys()
        assert all(vars(part)[key] is value for key, value in attributes.items())
        assert dict(part._modules) == children
    assert [p for p in model.parameters() if p.grad is not None] == [next(model.parameters())]
    assert len(handles) == sum(len(part._forward_pre_hooks) for part in model.modules())
    assert head.weight.requires_grad


def test_layers_below_may_be_quantised_or_elsewhere() -> None:
    model = of_class(Llama)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(H, H, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].to("meta")
    assert topd.Head.from_model(model).weight is model.lm_head.weight
    broken = of_class(Halved)
    broken.model.to("meta")
    with pytest.raises(ValueError, match=DIFFERS):
        topd.Head.from_model(broken)


def test_modes_around_the_call_do_not_matter() -> None:
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad(), torch.device("meta")):
        model = of_class(Llama)
        with context:
            topd.Head.from_model(model)
        assert model in verify_head._verified
        broken = of_class(Halved)
        with context, pytest.raises(ValueError, match=DIFFERS):
            topd.Head.from_model(broken)


def test_a_model_is_not_kept_alive() -> None:
    topd.Head.from_model(of_class(Llama))
    gc.collect()
    assert not [model for model in verify_head._verified if type(model) is Llama]


# Wrappers


def test_adapters_and_wrappers_are_looked_through(one_rank: None) -> None:
    for kind, refused in ((Llama, False), (Halved, True)):
        wrapped = [
            lora(of_class(kind)),
            lora(of_class(kind, torch.bfloat16)),
            lora(of_class(kind), target_modules=["q_proj"], modules_to_save=["lm_head"]),
            torch.compile(of_class(kind)),
            nn.parallel.DistributedDataParallel(of_class(kind)),
        ]
        for part in ("lm_head", "model"):
            model = of_class(kind)
            setattr(model, part, torch.compile(getattr(model, part)))
            wrapped.append(model)
        for model in wrapped:
            if refused:
                with pytest.raises(ValueError, match=DIFFERS + "Halved"):
                    topd.Head.from_model(model)
            else:
                assert isinstance(topd.Head.from_model(model), topd.Head)


def test_a_switched_adapter_is_looked_at_again() -> None:
    Llama.calls = 0
    model = lora(of_class(Llama))
    topd.Head.from_model(model)
    with model.disable_adapter():
        topd.Head.from_model(model)
    assert Llama.calls == 2


def test_a_multimodal_subclass_is_looked_at() -> None:
    kind = transformers.PaliGemmaForConditionalGeneration

    class Mine(kind):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1
            return output

    model = multimodal("PaliGemma", "Gemma2", final_logit_softcapping=2.0)
    assert topd.Head.from_model(model).softcap == 2.0
    assert model in verify_head._verified
    model.__class__ = Mine
    with pytest.raises(ValueError, match=DIFFERS + "Mine"):
        topd.Head.from_model(model)


def test_a_model_whose_class_names_no_base_model_is_looked_at() -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=V, hidden_size=H, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.Llama4ForCausalLM(config)
    assert model.base_model is model
    topd.Head.from_model(model)
    assert model in verify_head._verified


# What cannot be checked, and who else checks


def test_a_forward_that_cannot_run_is_refused_with_its_reason() -> None:
    class Needy(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, pixels: Tensor) -> Any:
            return super().forward(input_ids)

    class Silent(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor) -> str:
            return "nothing"

    with pytest.raises(ValueError, match=r"could not be checked: Needy's forward raised TypeError: .*pixels.*verify=False"):
        topd.Head.from_model(of_class(Needy))
    assert topd.Head.from_model(of_class(Needy), verify=False).scale == 1.0
    with pytest.raises(ValueError, match=r"Silent's forward raised TypeError: it returned no logits but a str; pass verify"):
        topd.Head.from_model(of_class(Silent))


def test_objectives_check_once_and_refuse() -> None:
    ids = torch.randint(3, V, (1, 8))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "response_mask": mask.index_fill(1, torch.tensor([0, 1]), 0)}
    Llama.calls = 0
    objective = topd.OPD(of_class(Llama), llama())
    for _ in range(3):
        objective(batch).loss.backward()
    assert Llama.calls == 1
    with pytest.raises(ValueError, match=DIFFERS + "Halved"):
        topd.OPD(of_class(Halved), llama())(batch)
    with pytest.raises(ValueError, match=DIFFERS + "Halved"):
        topd.hidden_states(of_class(Halved), ids)


def test_verify_is_a_flag() -> None:
    with pytest.raises(TypeError, match="verify must be True or False, got 1"):
        topd.Head.from_model(llama(), verify=1)  # type: ignore[arg-type]
