"""Tiny random models in a folder, with bytes as tokens, and the demo's command run on them."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from topd.cli.main import main  # noqa: E402
from topd_demo import training  # noqa: E402
from topd_demo.display import Display  # noqa: E402

TIMES = ("seconds_", "tokens_a_second", "memory_mib")
END = "<end>"
QUICK = {"steps": 4, "evaluate_every": 2, "held_out": 3, "held_out_tokens": 6, "horizon": 5}


def tokenizer(*extra: str) -> Any:
    """Return a tokenizer with bytes as tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([END, *letters, *extra])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


def saved(folder: Path, layers: int, seed: int, *, extra: tuple[str, ...] = (), vocab: int | None = None) -> str:
    words = tokenizer(*extra)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": vocab or len(words), "num_hidden_layers": layers, "max_position_embeddings": 512}
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "initializer_range": 0.4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def demo(pair: list[str], out: Path, *words: str) -> int:
    return main(["demo", "--quick", "--tokens", "8", "--batch", "2", *pair, "--out", str(out), *words])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what a clock or the system says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)} for line in lines]


@contextmanager
def dying(done: int) -> Iterator[None]:
    """Let a run die in the middle of the step that follows so many."""
    step, calls = training.Trainer._step, []

    def last(self, index):
        calls.append(index)
        if len(calls) == done + 1:
            raise KeyboardInterrupt
        return step(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "_step", last)
        yield


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """Send Ctrl-C where a step is shown."""
    show = Display.show

    def interrupting(self, record):
        show(self, record)
        if record.get("step") == step and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "show", interrupting)
        yield


class Page(HTMLParser):
    """What a page holds: its tags, what it links to, its titles, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        self.titles += [value for key, value in attrs if key == "title" and value]

    def handle_data(self, data):
        self.text += data


def failing(capsys, *words: str) -> str:
    """Return the one line that a command ends with."""
    assert main(["demo", *words]) == 1
    line = capsys.readouterr().err
    assert line.startswith("topd demo: ")
    assert line.count("\n") == 1
    assert "Traceback" not in line
    return line
