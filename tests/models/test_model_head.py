"""Head.from_model: the model's own logits from its last hidden state, for tiny models of random weights."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import topd
from topd.models import head_from_model as integration

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

OLDER = Version(transformers.__version__) < Version("5.23")
of_the_newest = pytest.mark.skipif(OLDER, reason="the table is of transformers 5.23")
V, H = 61, 32
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
GPT2 = {
    "vocab_size": V,
    "n_embd": H,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INKLING = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}
INKLING |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
# Scales and softcaps are chosen far from 1 and small, so that a forgotten one shows.
CAUSAL = {
    "Llama tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama untied": ("Llama", UNTIED),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {}),
    "GPT2": ("GPT2", GPT2),
    "GPTJ bias": ("GPTJ", GPT2 | {"rotary_dim": 4}),
    "Phi bias": ("Phi", {}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Mamba": ("Mamba", {"state_size": 4}),
    "Mpt unused attribute": ("Mpt", {"d_model": H, "n_heads": 4, "n_layers": 2, "vocab_size": V, "logit_scale": 3.0}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "Gemma2 none": ("Gemma2", {"final_logit_softcapping": None}),
    "Gemma3 text": ("Gemma3Text", {"final_logit_softcapping": 1.5}),
    "VaultGemma": ("VaultGemma", {"final_logit_softcapping": 2.0}),
    "NanoChat": ("NanoChat", {"final_logit_softcapping": 2.0}),
    "RecurrentGemma": ("RecurrentGemma", {"num_hidden_layers": 3, "logits_soft_cap": 2.0, "lru_width": H}),
    "Granite": ("Granite", {"logits_scaling": 8.0}),
    "GraniteMoe": ("GraniteMoe", EXPERTS | {"logits_scaling": 6.0}),
    "GraniteMoeShared": ("GraniteMoeShared", EXPERTS | {"logits_scaling": 6.0}),
    "MiniCPM3": ("MiniCPM3", MLA | {"dim_model_base": 8}),
    "HyperCLOVAX": ("HyperCLOVAX", {"logits_scaling": 0.125}),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}),
    "Cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "FalconH1": ("FalconH1", MAMBA | {"lm_head_multiplier": 0.3}),
    "Inkling": ("InklingText", INKLING | {"logits_mup_width_multiplier": 4.0, "unpadded_vocab_size": 50}),
}


def spread(model: Any) -> Any:
    """Away from the initial zeros and ones, so that every bias and adapter counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(name: str, options: dict[str, Any]) -> Any:
    if OLDER and not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    sizes = {} if "n_embd" in options else SIZES
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def llama() -> Any:
    return build("Llama", UNTIED)


def token_ids() -> Tensor:
    return torch.randint(3, V - 1, (2, 7), generator=torch.Generator().manual_seed(2))


def hidden_of(model: Any) -> Tensor:
    base = model.model if model.base_model is model else model.base_model
    return base(input_ids=token_ids()).last_hidden_state


def assert_same_logits(model: Any, hidden: Tensor | None = None) -> topd.Head:
    head = topd.Head.from_model(model)
    with torch.no_grad():
        hidden = hidden_of(model) if hidden is None else hidden
        expected = model(input_ids=token_ids()).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=0)
    return head


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.replace(" ", "-"))
def test_logits_are_the_models_own(case: str) -> None:
    model = build(*CAUSAL[case])
    head = assert_same_logits(model)
    assert head.weight.untyped_storage().data_ptr() == model.get_output_embeddings().weight.untyped_storage().data_ptr()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def multimodal(name: str, text: str, **options: Any) -> Any:
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=H).to_dict()
    config = getattr(transformers, f"{name}Config")(
        text_config=getattr(transformers, f"{text}Config")(**SIZES, **options).to_dict(),
        vision_config=vision,
        image_token_id=V - 1,
        mm_tokens_per_image=4,
        projection_dim=H,
    )
    return spread(getattr(transformers, f"{name}ForConditionalGeneration")(config))


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


# PEFT


def lora(model: Any | None = None, name: str = "default", **options: Any) -> Any:
    options = {"r": 3, "lora_alpha": 12, "target_modules": ["lm_head", "q_proj"]} | options
    return spread(peft.get_peft_model(model or llama(), peft.LoraConfig(**options), adapter_name=name))


def assert_same_as_wrapped(model: Any) -> topd.Head:
    with torch.no_grad():
        hidden = hidden_of(model.get_base_model())
    return assert_same_logits(model, hidden)


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


# Wrappers


@pytest.fixture
def one_rank() -> Any:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_compiled_and_parallel_wrappers_are_seen_through(one_rank: None) -> None:
    model = llama()
    parallel = nn.parallel.DistributedDataParallel(model)
    for wrapped in (torch.compile(model), parallel, torch.compile(parallel), nn.DataParallel(model)):
        assert topd.Head.from_model(wrapped).weight is model.lm_head.weight
    assert topd.Head.from_model(torch.compile(lora(model))).adapter is not None
    model = llama()
    weight = model.lm_head.weight
    model.lm_head = torch.compile(model.lm_head)
    assert topd.Head.from_model(model).weight is weight


def test_sharded_weight_is_refused(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = llama()
    fully_shard(model)
    message = r"got a DTensor with placements \(Shard\(dim=0\),\) in FSDPLlamaForCausalLM; gather it with weight"
    with pytest.raises(ValueError, match=message):
        topd.Head.from_model(model)
    model.unshard()
    assert topd.Head.from_model(model).scale == 1.0


# Weights and layers that no Head can hold


def test_an_empty_or_flat_shard_is_refused() -> None:
    for shape in ((0,), (V * H,)):
        model = llama()
        model.lm_head.weight = nn.Parameter(torch.zeros(shape))
        message = rf"got shape \[{shape[0]}\] \(sharded by ZeRO-3 or FSDP\?\) in LlamaForCausalLM; gather it"
        with pytest.raises(ValueError, match=message):
            topd.Head.from_model(model)


def test_a_sharded_adapter_is_refused() -> None:
    model = lora()
    model.get_base_model().lm_head.lora_B["default"].weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"the whole lora_B of its head .* got shape \[0\]"):
        topd.Head.from_model(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_weight_is_refused(dtype: torch.dtype) -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, H).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"a quantised Parameter of {dtype} in LlamaForCausalLM; leave lm_head out"):
        topd.Head.from_model(model)


def test_a_wrapper_subclass_is_refused() -> None:
    class Packed(Tensor):
        def __tensor_flatten__(self) -> None: ...

    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, H).as_subclass(Packed))
    with pytest.raises(ValueError, match=r"a quantised Packed of torch.float32 in LlamaForCausalLM"):
        topd.Head.from_model(model)


def test_an_offloaded_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a meta tensor \(offloaded\?\) in LlamaForCausalLM; keep lm_head on a device"):
        topd.Head.from_model(llama().to("meta"))


class Doubling(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


@pytest.mark.parametrize(
    ("layer", "came"),
    [
        (lambda: Doubling(H, V), r"\S+Doubling"),
        (lambda: nn.Embedding(V, H), r"torch.nn.modules.sparse.Embedding"),
        (lambda: nn.ModuleList([nn.Linear(H, V)]), r"torch.nn.modules.container.ModuleList"),
        (lambda: transformers.pytorch_utils.Conv1D(V, H), r"transformers.pytorch_utils.Conv1D"),
    ],
)
def test_a_layer_that_is_not_linear_is_refused(layer: Any, came: str) -> None:
    model = llama()
    model.lm_head = layer()
    with pytest.raises(ValueError, match=rf"must have a torch.nn.Linear .* got {came} in LlamaForCausalLM; build topd"):
        topd.Head.from_model(model)


# Models whose logits are not a Head's


def test_what_is_no_language_model_is_refused() -> None:
    for value, name in (
        (nn.Linear(2, 3), "Linear"),
        (nn.DataParallel(nn.Linear(2, 3)), "DataParallel"),
        ("gpt2", "str"),
    ):
        with pytest.raises(TypeError, match=rf"model must be a transformers causal .* got {name}; for another model build"):
            topd.Head.from_model(value)
    with pytest.raises(ValueError, match=r"must have output embeddings, got None in LlamaModel; pass the causal"):
        topd.Head.from_model(llama().model)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"decoder-only, got an encoder-decoder in T5ForConditionalGeneration; take"):
        topd.Head.from_model(transformers.T5ForConditionalGeneration(config))


def test_layers_between_the_last_hidden_state_and_the_head_are_refused() -> None:
    sizes = SIZES | {"is_decoder": True}
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**sizes))
    with pytest.raises(ValueError, match=r"got them inside a BertLMPredictionHead in BertLMHeadModel; build topd.Head"):
        topd.Head.from_model(bert)
    electra = transformers.ElectraForCausalLM(transformers.ElectraConfig(**sizes, embedding_size=16))
    with pytest.raises(ValueError, match=r"got a class that puts a dense layer .* in ElectraForCausalLM; take another"):
        topd.Head.from_model(electra)


class Elsewhere(nn.Module):
    """A language model that comes with a checkpoint."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.lm_head = nn.Linear(H, V)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def test_a_class_from_elsewhere_is_plain_or_refused() -> None:
    model = Elsewhere(logits_scaling=1.0, final_logit_softcapping=None)
    assert topd.Head.from_model(model).weight is model.lm_head.weight
    for config in ({"logits_scaling": 8.0}, {"text_config": SimpleNamespace(logits_scaling=8.0)}):
        message = r"got config.logits_scaling = 8.0, whose meaning there is unknown, in Elsewhere; build topd.Head"
        with pytest.raises(ValueError, match=message):
            topd.Head.from_model(Elsewhere(**config))


def test_a_derived_class_counts_as_its_parent() -> None:
    class Mine(transformers.GraniteForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    config = transformers.GraniteConfig(**SIZES, logits_scaling=8.0)
    assert assert_same_logits(spread(Mine(config))).scale == 1 / 8


def test_a_class_without_the_attribute_of_its_entry_is_refused() -> None:
    model = build("Cohere", {})
    del model.logit_scale
    with pytest.raises(ValueError, match=r"must have logit_scale, got none in CohereForCausalLM; this version"):
        topd.Head.from_model(model)


# The table against the source of transformers


REMAKES = re.compile(
    r"tanh\(|soft_?cap|\b(lm_)?logits = (lm_)?logits [*/]|\b(lm_)?logits(\[.*\] = | = logits\[\.\.\.)|"
    r"lm_head\(.*\) [*/+]|\b(hidden_states|last_hidden_state|outputs\[0\]) [*/]=? |\(self\.lm_head\("
)
# Refused as such.
ENCODER_DECODERS = {"T5Gemma", "T5Gemma2", "LED", "MBart", "Mvp", "Pegasus"}


def forwards() -> dict[str, str]:
    """The source of `forward` of every class with a language model head."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for text in re.split(r"^(?=class )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            name = re.match(r"class (\w+For(?:CausalLM|ConditionalGeneration)|\w+LMHeadModel)\b", text)
            body = re.search(r"^    def forward\(.*?(?=^    (?:def|@)|^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
            if name and body:
                found[name[1]] = body[0]
    return found


@of_the_newest
def test_the_table_covers_every_class_that_remakes_its_logits() -> None:
    sources = forwards()
    assert len(sources) > 150
    tabled = {name for name in sources if integration._postprocessing(name)} | set(integration._REFUSED)
    unknown = []
    for name, source in sources.items():
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("#", 'r"""'))]
        stem = name.partition("For")[0]
        if name not in tabled and stem not in ENCODER_DECODERS and REMAKES.search("\n".join(lines)):
            unknown.append(name)
    assert unknown == []


@of_the_newest
def test_every_entry_of_the_table_names_a_class_that_reads_the_attribute() -> None:
    sources = forwards()
    for _, path, causal, conditional in integration._POSTPROCESSING:
        attribute = path.rstrip("?").removesuffix(".softcap").split(".")[-1]
        names = [f"{stem}ForCausalLM" for stem in causal.split()]
        names += [f"{stem}ForConditionalGeneration" for stem in conditional.split()]
        for name in names:
            assert attribute in sources[name], (name, attribute)
    absent = {name for name in integration._REFUSED if name not in sources}
    assert absent == {"DiffusionGemmaForBlockDiffusion"}


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
