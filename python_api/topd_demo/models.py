"""The teacher, the student and their tokenizer; whether they go together."""

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

import topd
from topd.cli.errors import CommandError, require
from topd_demo import smollm2
from topd_demo.influence import least_influence, without_layers
from topd_demo.prompts import CHAT, encode
from topd_demo.settings import Settings

SMOLLM2, LORA_RANK, LEFT_OUT = "SmolLM2-135M-Instruct", 16, 6


class Models(NamedTuple):
    """Both models, in eval mode, float32, on the run's device; the student trains.

    Attributes:
        common_vocabulary: the tokens that both read; what either has beyond them is padding.
        left_out: the teacher's layers that the student is without; None: it is no such copy.
    """

    student: Any
    teacher: Any
    tokenizer: Any
    description: str
    common_vocabulary: int
    left_out: tuple[int, ...] | None = None


def load(settings: Settings) -> Models:
    """Load both models and their tokenizer.

    Raises:
        CommandError: a package or a model is missing, or the two do not share their tokens.
    """
    require(("transformers",), "the demo", 'pip install "topd[demo]"')
    from transformers.utils import logging

    logging.disable_progress_bar()
    teacher, tokenizer = _teacher(settings)
    left_out = settings.left_out
    if settings.student is not None:
        student = _pretrained(settings.student, "student")
        check_tokenizers(tokenizer, _tokenizer(settings.student, tokenizer))
        name = settings.student
    elif settings.paired:
        student, name = copy.deepcopy(teacher), "its copy"
    else:
        left_out = settings.left_out or _least_needed(teacher, tokenizer)
        student = without_layers(teacher, left_out)
        layers = f"{', '.join(map(str, left_out))} of its {teacher.config.num_hidden_layers} layers (counted from 0)"
        name = f"a copy of itself that lacks {layers}"
    check_vocabularies(student, teacher, tokenizer)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    device = torch.device(settings.device)
    description = f"{settings.teacher or SMOLLM2} teaches {name}"
    student, teacher = student.to(device).eval(), teacher.to(device).eval()
    common = min(topd.Head.from_model(model).weight.shape[0] for model in (student, teacher))
    return Models(student, teacher, tokenizer, description, common, left_out)


def load_with_lora(settings: Settings) -> Models:
    """Load the one model of self-distillation, with a fresh LoRA that is trained; it stands for the teacher too.

    Raises:
        CommandError: a package or the model is missing.
    """
    require(("transformers", "peft"), "--method opsd", 'pip install "topd[demo]"')
    from peft import LoraConfig, get_peft_model

    if settings.student is None:
        model, tokenizer = _teacher(settings)
    else:
        model, tokenizer = _pretrained(settings.student, "student"), _tokenizer(settings.student)
    check_vocabularies(model, model, tokenizer)
    torch.manual_seed(settings.seed)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers renames
        student = get_peft_model(model, lora).to(torch.device(settings.device)).eval()
    description = f"{settings.student or SMOLLM2} teaches itself: a LoRA of rank {LORA_RANK}"
    return Models(student, student, tokenizer, description, topd.Head.from_model(model).weight.shape[0])


def _least_needed(teacher: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the LEFT_OUT layers of the teacher that have the least influence on the prompts of a chat."""
    input_ids, attention_mask = encode(tokenizer, list(CHAT), torch.device("cpu"))
    return tuple(sorted(least_influence(teacher, input_ids, attention_mask)[:LEFT_OUT]))


def _teacher(settings: Settings) -> tuple[Any, Any]:
    """Load the teacher and its tokenizer."""
    if settings.teacher is not None:
        if settings.student is None:
            raise CommandError(f"a student for {settings.teacher} is missing: name one with --student")
        return _pretrained(settings.teacher, "teacher"), _tokenizer(settings.teacher)
    if absent := smollm2.missing():
        raise CommandError(absent)
    return smollm2.load_model(), smollm2.load_tokenizer()


def _pretrained(name: str, role: str) -> Any:
    """Load a model of the hub or of a folder."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"the {role} {name!r} cannot be loaded ({_short(error)}): name a model of the hub or a folder"
        ) from error


def _tokenizer(name: str, otherwise: Any = None) -> Any:
    """Load a model's own tokenizer; return `otherwise` where its folder has none."""
    from transformers import AutoTokenizer

    has_none = Path(name).is_dir() and not any(
        (Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")
    )
    if has_none and otherwise is not None:
        return otherwise
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(f"the tokenizer of {name!r} cannot be loaded ({_short(error)}): put it beside the model") from error


def _short(error: Exception) -> str:
    """Return the beginning of an error's text."""
    return str(error).strip().partition("\n")[0][:120].rstrip(".")


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Check that every token has one id in both tokenizers.

    Raises:
        CommandError: otherwise.
    """
    if teacher is student:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    odd = next(token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token))
    raise CommandError(
        f"teacher and student have different tokenizers: {odd!r} is {theirs.get(odd, 'no token')} to the teacher and "
        f"{ours.get(odd, 'no token')} to the student; distillation compares them token by token: take models of one family"
    )


def check_vocabularies(student: Any, teacher: Any, tokenizer: Any) -> None:
    """Check that both heads have a row for every token; rows beyond them (padding) may differ.

    Raises:
        CommandError: otherwise.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            other = teacher if role == "student" else student
            raise CommandError(
                f"the {role}'s vocabulary has {rows:,} entries, the tokenizer {len(tokenizer):,} and the other model "
                f"{other.get_output_embeddings().weight.shape[0]:,}: take models that share a vocabulary"
            )
