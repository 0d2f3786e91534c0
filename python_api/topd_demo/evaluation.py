"""How far the student is from the teacher on prompts that it is not trained on, and what both answer to them."""

from dataclasses import dataclass
from typing import Any

import torch

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo.models import Models
from topd_demo.prompts import encode
from topd_demo.settings import Settings
from topd_demo.wording import Wording, end_tokens_of, wording

CUT = " …"  # behind an answer that does not end by itself


@dataclass
class Transcript:
    """A model's answers, its most likely token each time.

    Attributes:
        samples: each prompt with the answer to it.
        wording: of the answers.
    """

    samples: list[list[str]]
    wording: Wording


@dataclass
class Evaluation:
    """How far the student was from the teacher.

    Attributes:
        reverse_kl: KL(p_S || p_T), the mean over the tokens of responses that the student samples, nats.
        student: what it answers.
        teacher: what the teacher answers, always the same; None: not asked.
    """

    reverse_kl: float
    student: Transcript
    teacher: Transcript | None = None

    def numbers(self) -> dict[str, float]:
        """Return what a record holds of it."""
        values = {"held_out_reverse_kl": self.reverse_kl, **self.student.wording.numbers()}
        if self.teacher is not None:
            values |= {f"teacher_{name}": value for name, value in self.teacher.wording.numbers().items()}
        return values


@torch.no_grad()
def evaluate(models: Models, prompts: list[str], settings: Settings, first: bool) -> Evaluation:
    """Compare both models on responses that the student samples now, from the same seed every time, and let it answer; at
    first the teacher too."""
    objective = topd.OPD(models.student, models.teacher, allow_unequal_vocabularies=True)  # padding beyond the tokenizer
    reverse_kl = objective(held_out_batch(models, prompts, settings)).loss.item()
    answering = (models.student, models.teacher) if first else (models.student,)
    return Evaluation(reverse_kl, *(_transcript(model, objective, models, prompts, settings) for model in answering))


def held_out_batch(models: Models, prompts: list[str], settings: Settings) -> dict[str, Any]:
    """Sample rollouts of the student on the held-out prompts."""
    return _responses(models.student, models, prompts, settings, temperature=1.0)


def _transcript(model: Any, objective: topd.OPD, models: Models, prompts: list[str], settings: Settings) -> Transcript:
    """Let one of the models answer; the teacher judges the answer's tokens."""
    batch = _responses(model, models, prompts, settings, temperature=0.0)
    answers = [ids[response].tolist() for ids, response in zip(batch["input_ids"], batch["response_mask"], strict=True)]
    end_tokens = end_tokens_of(model)
    texts = [models.tokenizer.decode(ids, skip_special_tokens=True) + ("" if ids[-1] in end_tokens else CUT) for ids in answers]
    perplexity = objective(batch).metrics["teacher_perplexity"].item()
    samples = [[prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
    return Transcript(samples, wording(answers, end_tokens, perplexity))


def _responses(model: Any, models: Models, prompts: list[str], settings: Settings, temperature: float) -> dict[str, Any]:
    """Let one of the models continue the held-out prompts, from the same seed every time."""
    ids, attended = encode(models.tokenizer, prompts, torch.device(settings.device))
    torch.manual_seed(settings.seed)
    options: dict[str, Any] = {"max_new_tokens": settings.held_out_tokens, "vocabulary": models.common_vocabulary}
    return sample_rollouts(model, ids, attended, temperature=temperature, **options)
