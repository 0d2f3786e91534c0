"""The output layer and the final norm of a checkpoint, read without the rest of the model.

What a model does to its logits is told by its class, which is built on the meta device, without numbers. Neither transformers
nor safetensors is imported with this module.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topd.head import Head
from topd.models.head_from_model import base_of, shaping_of
from topd.ops.shared.collectives import outcomes
from topd.vocab_shard import VocabShard

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
RENAMED = "embed_out.weight"  # the output embeddings of GPT-NeoX in its files; transformers renames them


def head_from_checkpoint(folder: str | Path, shard: VocabShard | None = None) -> Head:
    """Return the head of a checkpoint of transformers: its output embeddings, bias, scale and softcap, and nothing else of it.

    For a teacher of which no more is needed here, since its hidden states come from elsewhere. Of the files only these tensors
    are read, and of them only the rows that this rank holds.

    Args:
        folder: a local folder with config.json and model.safetensors, or model.safetensors.index.json and its files. An
            adapter (PEFT) beside them is not looked at. The class is one that transformers has.
        shard: None: the whole head. Or the VocabShard of this rank: the rows from its `start` to that of the next rank, those
            of the last rank to `vocab`. Collective: every rank of the group calls it.

    Returns:
        A Head on the CPU, in the dtype of the file, that requires no grad.

    Raises:
        TypeError: a wrong type.
        ValueError: a file that is missing, a class that transformers lacks or whose logits are not a Head's, more tokens than
            the file has rows; ranks that do not hold the vocabulary in their order, or of which one was refused.
    """
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a topd.VocabShard or None, got {type(shard).__name__}")
    problem: Exception | None = None
    try:
        checkpoint = _Checkpoint(_folder(folder))
        layer, names = checkpoint.output_layer()
        shaping = shaping_of(checkpoint.model, layer)
        rows = checkpoint.rows_of(names["weight"]) if shaping.rows is None else shaping.rows
        if shard is not None and shard.vocab > rows:
            raise ValueError(f"shard.vocab must be at most {rows}, the tokens of {folder}, got {shard.vocab}")
    except Exception as error:
        problem = error
    stop = _stop(shard, rows if problem is None else None)
    if problem is not None:
        raise problem
    start = 0 if shard is None else min(shard.start, stop)
    parts = {key: checkpoint.rows(name, start, stop) for key, name in names.items()}
    return Head(parts["weight"], parts.get("bias"), scale=shaping.scale, softcap=shaping.softcap, shard=shard)


def final_norm_from_checkpoint(folder: str | Path) -> nn.Module:
    """Return the norm that a checkpoint's model applies to its last hidden states before the head.

    For states of a teacher that come from elsewhere and were taken before that norm, as vLLM's are: head.logits(norm(states)).

    Args:
        folder: as of `head_from_checkpoint`.

    Returns:
        The model's own module, on the CPU, in the dtype of the file and in eval mode; its parameters require no grad.

    Raises:
        ValueError: a file that is missing, a class that transformers lacks, or a model in which not exactly one norm follows
            the layers.
    """
    checkpoint = _Checkpoint(_folder(folder))
    name, norm = checkpoint.final_norm()
    tensors = {key: checkpoint.rows(checkpoint.key_of([f"{name}.{key}"])) for key, _ in norm.named_parameters()}
    norm = norm.to_empty(device="cpu").requires_grad_(False).eval()
    norm.load_state_dict(tensors, strict=True, assign=True)
    return norm.requires_grad_(False)


def _folder(folder: object) -> Path:
    """Check that a checkpoint lies in a folder."""
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder must be a str or a Path, got {type(folder).__name__}")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"folder must be a local folder with config.json, got {str(folder)!r}; download the checkpoint first")
    return path


def _stop(shard: VocabShard | None, rows: int | None) -> int:
    """Return the token before which this rank's rows end; all ranks of a shard's group tell each other where theirs begin.

    Args:
        rows: how many tokens there are; None: this rank was refused.
    """
    if shard is None:
        return rows or 0
    on_cpu = "gloo" in torch.distributed.get_backend(shard.group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    each = outcomes(shard.group, [rows is not None, shard.start, shard.vocab], device)
    if rows is None:
        return 0
    if refused := [rank for rank, (passed, *_) in enumerate(each) if not passed]:
        raise ValueError(f"the checkpoint was refused on rank {refused[0]} of the shard's group, whose message says why")
    starts = [start for _, start, _ in each]
    if starts != sorted(starts) or starts[0] != 0 or len({vocab for *_, vocab in each}) > 1:
        raise ValueError(
            "the ranks of a sharded head must begin at 0 and hold one vocabulary in their order, got starts "
            f"{starts} and vocab {[vocab for *_, vocab in each]}"
        )
    return min([*starts[1:], shard.vocab][shard.group.rank()], shard.vocab)


class _Checkpoint:
    """The files of a folder, and the model of its config without numbers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder, self.files = folder, _files(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config)
        self.tied = bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))

    def output_layer(self) -> tuple[nn.Module, dict[str, str]]:
        """Return the output layer, and the keys of its weight and bias in the files."""
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"folder must hold a model whose output embeddings are a torch.nn.Linear, got {type(layer).__name__} in "
                f"{type(self.model).__name__}; build topd.Head by hand"
            )
        sources = [layer, self.model.get_input_embeddings()] if self.tied else [layer]
        names = {"weight": self.key_of([*(f"{self._name_of(source)}.weight" for source in sources), RENAMED])}
        if layer.bias is not None:
            names["bias"] = self.key_of([f"{self._name_of(layer)}.bias"])
        return layer, names

    def final_norm(self) -> tuple[str, nn.Module]:
        """Return the norm that follows the layers, and its name in the model."""
        base: nn.Module = base_of(self.model)
        owner = next(part for part in base.modules() if any(isinstance(child, nn.ModuleList) for child in part.children()))
        children = list(owner.named_children())
        last = max(index for index, (_, child) in enumerate(children) if isinstance(child, nn.ModuleList))
        norms = [(index, name, child) for index, (name, child) in enumerate(children) if "norm" in type(child).__name__.lower()]
        # OPT makes it before the layers; BLOOM has one there that is not the last.
        final = [child for index, name, child in norms if index > last or "final" in name]
        if len(final) == 1:
            return self._name_of(final[0]), final[0]
        raise ValueError(
            "folder must hold a model with exactly one norm behind its layers, got another one, a "
            f"{type(self.model).__name__}; read the norm by hand"
        )

    def _name_of(self, module: nn.Module) -> str:
        """Return the name of a module in the model."""
        names: dict[nn.Module, str] = {part: name for name, part in self.model.named_modules()}
        return names[module]

    def key_of(self, names: list[str]) -> str:
        """Return the first of these names that is a key in the files, where it may stand under another prefix."""
        for name in names:
            if name in self.files:
                return name
        for name in names:
            bare = name.removeprefix(f"{self.model.base_model_prefix}.")
            ending = [key for key in self.files if key.endswith(f".{bare}") or key == bare]
            if len(ending) == 1:
                return ending[0]
        raise ValueError(f"folder must hold {' or '.join(names)}, got no such tensor in {str(self.folder)!r}")

    def rows_of(self, key: str) -> int:
        """Return how many rows a tensor has; nothing of it is read."""
        from safetensors import safe_open

        with safe_open(self.files[key], framework="pt") as file:
            return int(file.get_slice(key).get_shape()[0])

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows of a tensor from start to stop, copied out of the file's memory."""
        from safetensors import safe_open

        with safe_open(self.files[key], framework="pt") as file:
            part: Tensor = file.get_slice(key)[start:stop]
            return part.clone()


def _files(folder: Path) -> Mapping[str, Path]:
    """Return the file of each tensor, by its key."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        return {key: folder / name for key, name in index["weight_map"].items()}
    if not (folder / FILE).is_file():
        raise ValueError(
            f"folder must hold {FILE}, or {INDEX} and its files, got neither in {str(folder)!r}; save the model by "
            "save_pretrained, which writes them"
        )
    with safe_open(folder / FILE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / FILE)
