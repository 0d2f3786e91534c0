"""Widths, vocabulary and the size of the head of a model, read from its configuration; no weight is loaded."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class ModelShape(NamedTuple):
    """What a loss must know of a model. `tied`: the head's weight is the embedding too, None: the config does not say.
    `parameters`: how many numbers its weights have, about, None: unknown."""

    name: str
    hidden: int
    vocab: int
    tied: bool | None = None
    parameters: int | None = None


def model_shape(name: str) -> ModelShape:
    """Return the shape of a folder's config.json, or of a model on a hub whose configuration transformers can load.

    Raises:
        ValueError: there is none, or it lacks a number; the message says what to do.
    """
    folder = Path(name)
    if folder.is_dir():
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{name} must hold a config.json, and has none; pass --hidden and --vocab instead") from None
        except ValueError as error:
            raise ValueError(f"{path} must be JSON, and is not ({error}); save it anew") from None
    else:
        config = _from_hub(name)
    return _shape(name, config)


def _from_hub(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            f"{name!r} is no folder, and names on a hub need transformers: install it, or pass a folder with config.json, "
            "or --hidden and --vocab"
        ) from None
    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no folder, and transformers cannot load its configuration ({str(error).strip().splitlines()[0]}); "
            "pass a folder with config.json, or --hidden and --vocab"
        ) from error


def _shape(name: str, config: Any) -> ModelShape:
    if not isinstance(config, dict):
        raise ValueError(f"the config of {name} must be a JSON object, got {type(config).__name__}")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    read = config | text
    hidden, vocab = (_size(name, read, key, option) for key, option in (("hidden_size", "--hidden"), ("vocab_size", "--vocab")))
    tied = read.get("tie_word_embeddings")
    tied = tied if isinstance(tied, bool) else None
    return ModelShape(name, hidden, vocab, tied, _parameters(read, hidden, vocab, tied=tied is True))


def _size(name: str, config: dict[str, Any], key: str, option: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} in the config of {name} must be a positive int, got {value!r}; pass {option} instead")
    return value


def _parameters(config: dict[str, Any], hidden: int, vocab: int, *, tied: bool) -> int | None:
    """Return the numbers in the matrices of a dense decoder with gated feed-forward layers; None for any other model."""
    layers, heads, inner = (config.get(key) for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(inner, int)) or heads < 1:
        return None
    if any("expert" in key and value for key, value in config.items()):
        return None
    width: int = config.get("head_dim") or hidden // heads
    pairs: int = config.get("num_key_value_heads") or heads
    attention = hidden * width * (2 * heads + 2 * pairs)
    return vocab * hidden * (1 if tied else 2) + layers * (attention + 3 * hidden * inner)
