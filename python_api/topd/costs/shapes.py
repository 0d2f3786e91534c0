"""Widths, vocabulary and the size of the head of a model, read from its configuration; no weight is loaded."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class ModelShape(NamedTuple):
    """What is known of a model's sizes.

    Attributes:
        name, hidden, vocab: what a loss must know.
        tied: the head's weight is the embedding too; None: the config does not say.
        parameters: how many numbers its weights have, about; None: unknown, and `unknown` says why.
        layers: of the decoder; None: unknown, as are the next two then.
        body: numbers in the layers' matrices.
        cached: numbers that a token has in a cache of keys and values.
    """

    name: str
    hidden: int
    vocab: int
    tied: bool | None = None
    parameters: int | None = None
    layers: int | None = None
    body: int | None = None
    cached: int | None = None
    unknown: str = ""


def model_shape(name: str, say: Callable[[str], None] = lambda line: None) -> ModelShape:
    """Return the shape of a folder's config.json, or of a model on a hub whose configuration transformers can load.

    Args:
        name: a path, or a name on a hub.
        say: is told, in a line, before a hub is asked.

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
    elif folder.is_absolute() or folder.parts[:1] == ("..",) or (len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()):
        raise ValueError(f"{name} must be a folder with config.json, or a name on a hub, and there is no such folder")
    else:
        config = _from_hub(name, say)
    return _shape(name, config)


def _from_hub(name: str, say: Callable[[str], None]) -> Any:
    """Return the configuration from transformers' cache, else from the hub.

    `say` is told before the network is asked."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            f"{name!r} is no folder, and names on a hub need transformers: install it, or pass a folder with config.json, "
            "or --hidden and --vocab"
        ) from None
    with suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(name, local_files_only=True).to_dict()
    say(f"{name} is not in transformers' cache: asking the hub, which without a network takes half a minute (Ctrl-C stops it)")
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
    shape = ModelShape(name, hidden, vocab, tied)
    unknown = _unknown(read)
    if unknown:
        return shape._replace(unknown=unknown)
    layers, heads = read["num_hidden_layers"], read["num_attention_heads"]
    width: int = read.get("head_dim") or hidden // heads
    pairs: int = read.get("num_key_value_heads") or heads
    attention = hidden * width * (2 * heads + 2 * pairs)
    body = layers * (attention + 3 * hidden * read["intermediate_size"])
    parameters = body + vocab * hidden * (1 if tied else 2)
    return shape._replace(parameters=parameters, layers=layers, body=body, cached=2 * layers * pairs * width)


def _size(name: str, config: dict[str, Any], key: str, option: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} in the config of {name} must be a positive int, got {value!r}; pass {option} instead")
    return value


def _unknown(config: dict[str, Any]) -> str:
    """Return why the numbers in a model's matrices are not known; empty for a dense decoder with gated feed-forward layers."""
    experts = next((key for key, value in config.items() if "expert" in key and value), None)
    if experts:
        return f"a mixture of experts ({experts} in its config)"
    needed = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = next((key for key in needed if not isinstance(config.get(key), int) or config[key] < 1), None)
    return f"no {missing} in its config" if missing else ""
