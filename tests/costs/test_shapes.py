"""What is read of a configuration."""

import json

import pytest

from topd.costs.shapes import ModelShape, model_shape


def folder_of(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_folder_is_read_by_json_alone(tmp_path):
    name = folder_of(tmp_path, hidden_size=64, vocab_size=1000, tie_word_embeddings=True)
    assert model_shape(name) == ModelShape(name, 64, 1000, True, None)


def test_numbers_of_the_text_model_come_first(tmp_path):
    name = folder_of(tmp_path, hidden_size=1, tie_word_embeddings=False, text_config={"hidden_size": 64, "vocab_size": 1000})
    assert model_shape(name) == ModelShape(name, 64, 1000, False, None)


def test_parameters_of_a_dense_decoder_by_hand(tmp_path):
    """Two layers: q and o 64 x 64, k and v 64 x 32, three matrices 64 x 128; embedding and head 1,000 x 64 each."""
    dense = {"hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense |= {"num_key_value_heads": 2, "intermediate_size": 128}
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert model_shape(folder_of(tmp_path, **dense)).parameters == 2 * 64_000 + layers
    assert model_shape(folder_of(tmp_path, **dense, tie_word_embeddings=True)).parameters == 64_000 + layers
    assert model_shape(folder_of(tmp_path, **dense, num_experts=8)).parameters is None


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

    def refused(name):
        raise OSError("no such model\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused)
    with pytest.raises(ValueError, match=r"cannot load its configuration \(no such model\); pass a folder"):
        model_shape("nobody/nothing")
