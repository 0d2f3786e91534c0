"""Heads and final norms that are read from checkpoints: what a loaded model has, and no more rows than needed."""

import pytest
import torch
from checkpoint_cases import FAMILIES, model_of
from compare import assert_near
from tiny_models import tiny
from two_ranks import start

import topd
from topd.integrations.distributed import final_norm_from_checkpoint, head_from_checkpoint

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("several", [False, True], ids=["one file", "several files"])
def test_head_and_norm_are_those_of_the_model(tmp_path, name, several):
    model = model_of(name)
    model.save_pretrained(tmp_path, max_shard_size="4KB" if several else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == several
    expected, head = topd.Head.from_model(model), head_from_checkpoint(tmp_path)
    assert head.tensors().keys() == expected.tensors().keys()
    for key, value in head.tensors().items():
        assert torch.equal(value, expected.tensors()[key])
        assert not value.requires_grad
    assert (head.scale, head.softcap) == (expected.scale, expected.softcap)
    states = []
    norm = final_norm_from_checkpoint(tmp_path)
    layer = next(part for part in model.base_model.modules() if type(part) is type(norm) and same(part, norm))
    layer.register_forward_hook(lambda _module, inputs, _output: states.append(inputs[0]))
    logits = model(torch.arange(10).view(1, -1)).logits
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    assert_near(head.logits(norm(states[-1])), logits.double(), 1e-5)


def same(norm, other):
    return all(torch.equal(mine, yours) for mine, yours in zip(norm.parameters(), other.parameters(), strict=True))


# Shards


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/checkpoint_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


def test_a_rank_reads_its_rows(ranks):
    expected = topd.Head.from_model(model_of("bias"))
    for rank, (begin, end) in zip(ranks, ((0, 20), (20, 50)), strict=True):
        assert torch.equal(rank["weight"], expected.weight[begin:end])
        assert torch.equal(rank["bias"], expected.bias[begin:end])
        assert rank["start"] == begin


def test_a_rank_reads_no_other_rows_into_memory(ranks):
    for rank in ranks:
        assert rank["rows_mib"] == 4
        assert rank["file_mib"] >= 64
        assert 4 <= rank["grown_mib"] < 12  # the rows as they lie in the file and their copy


def test_a_refusal_on_one_rank_reaches_the_other(ranks):
    assert "shard.vocab must be at most 53" in ranks[0]["refused"]
    assert "refused on rank 0" in ranks[1]["refused"]


def test_starts_out_of_order_are_refused(ranks):
    assert all("in their order, got starts [20, 0]" in rank["unordered"] for rank in ranks)


# Refusals


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be a local folder with config\.json"):
        head_from_checkpoint(tmp_path)
    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    for read in (head_from_checkpoint, final_norm_from_checkpoint):
        with pytest.raises(ValueError, match=r"folder must hold model.safetensors, or .*index.json and its files, got neither"):
            read(tmp_path)
        with pytest.raises(TypeError, match="folder must be a str or a Path, got int"):
            read(3)
    with pytest.raises(TypeError, match=r"shard must be a topd\.VocabShard or None, got int"):
        head_from_checkpoint(tmp_path, 3)


def test_a_checkpoint_without_the_tensor_is_refused(tmp_path):
    from safetensors.torch import save_file

    model_of("llama").config.save_pretrained(tmp_path)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"folder must hold lm_head\.weight or embed_out\.weight, got no such tensor"):
        head_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"folder must hold model\.norm\.weight, got no such tensor"):
        final_norm_from_checkpoint(tmp_path)


def test_an_embedding_under_another_prefix_is_read(tmp_path):
    """As in the checkpoints of models that read images too."""
    from safetensors.torch import save_file

    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    tensors = {f"language_model.{key}": value.detach().clone() for key, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(head_from_checkpoint(tmp_path).weight, model.lm_head.weight)
    assert torch.equal(final_norm_from_checkpoint(tmp_path).weight, model.model.norm.weight)


def test_a_tiny_model_of_the_demo_is_read(tmp_path):
    model = tiny("qwen3").bfloat16()
    model.save_pretrained(tmp_path)
    assert head_from_checkpoint(tmp_path).weight.dtype == torch.bfloat16
    assert final_norm_from_checkpoint(tmp_path).weight.dtype == torch.bfloat16
