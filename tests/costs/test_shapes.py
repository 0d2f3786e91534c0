"""What is read of a configuration."""

import json

import pytest

from topd.costs.shapes import model_shape

DENSE = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def folder_of(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_folder_is_read_by_json_alone(tmp_path):
    name = folder_of(tmp_path, hidden_size=64, vocab_size=1000, tie_word_embeddings=True)
    assert model_shape(name)[:5] == (name, 64, 1000, True, None)


def test_numbers_of_the_text_model_come_first(tmp_path):
    name = folder_of(tmp_path, hidden_size=1, tie_word_embeddings=False, text_config={"hidden_size": 64, "vocab_size": 1000})
    assert model_shape(name)[:5] == (name, 64, 1000, False, None)


def test_parameters_of_a_dense_decoder_by_hand(tmp_path):
    """Two layers: q and o 64 x 64, k and v 64 x 32, three matrices 64 x 128; embedding and head 1,000 x 64 each."""
    dense = {"hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense |= {"num_key_value_heads": 2, "intermediate_size": 128}
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert model_shape(folder_of(tmp_path, **dense)).parameters == 2 * 64_000 + layers
    assert model_shape(folder_of(tmp_path, **dense, tie_word_embeddings=True)).parameters == 64_000 + layers
    shape = model_shape(folder_of(tmp_path, **dense))
    assert (shape.layers, shape.body, shape.cached, shape.unknown) == (2, layers, 2 * 2 * 2 * 16, "")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({**DENSE, "num_experts": 8}, "a mixture of experts (num_experts"),
        (DENSE | {"intermediate_size": None}, "no intermediate_size in its config"),
        ({}, "no num_hidden_layers in its config"),
    ],
)
def test_what_is_no_dense_decoder_says_why_its_size_is_unknown(tmp_path, more, why):
    shape = model_shape(folder_of(tmp_path, hidden_size=64, vocab_size=1000, **more))
    assert shape.unknown.startswith(why)
    assert shape.parameters is shape.body is shape.cached is None


@pytest.mark.parametrize("value", [None, 0, True, "64"])
def test_a_width_that_is_none_is_refused(tmp_path, value):
    name = folder_of(tmp_path, hidden_size=value, vocab_size=1000)
    with pytest.raises(ValueError, match=r"hidden_size in the config .* must be a positive int, got .*pass --hidden"):
        model_shape(name)


def test_folders_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config\.json, and has none"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        model_shape(str(tmp_path))


def test_a_name_that_nobody_knows_says_what_to_do(monkeypatch):
    transformers = pytest.importorskip("transformers")

    asked, said = [], []

    def refused(name, local_files_only=False):
        asked.append(local_files_only)
        raise OSError("no such model\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused)
    with pytest.raises(ValueError, match=r"cannot load its configuration \(no such model\); pass a folder"):
        model_shape("nobody/nothing", said.append)
    assert asked == [True, False]
    assert len(said) == 1
    assert "asking the hub, which without a network takes half a minute" in said[0]


def test_a_name_in_the_cache_asks_no_hub(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config, said = transformers.LlamaConfig(hidden_size=64, vocab_size=1000), []

    def cached(name, local_files_only=False):
        assert local_files_only
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", cached)
    assert model_shape("somebody/something", said.append).hidden == 64
    assert said == []
