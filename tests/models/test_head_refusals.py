"""Wrappers that Head.from_model sees through; weights, layers and models of which no Head can be made."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_cases import SIZES, H, V, assert_same_logits, build, llama, lora, spread
from torch import Tensor, nn

import topd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


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
    message = r"got a DTensor with placements \(Shard\(dim=0\),\) in FSDPLlama.*; run the loss inside .* weight.full_tensor"
    with pytest.raises(ValueError, match=message):
        topd.Head.from_model(model)
    model.unshard()
    assert topd.Head.from_model(model).scale == 1.0


# Weights and layers that no Head can hold


def test_an_empty_or_flat_shard_is_refused() -> None:
    for shape in ((0,), (V * H,)):
        model = llama()
        model.lm_head.weight = nn.Parameter(torch.zeros(shape))
        message = rf"got shape \[{shape[0]}\] \(sharded by ZeRO-3 or FSDP\?\) in LlamaForCausalLM; run the loss inside"
        with pytest.raises(ValueError, match=message):
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
