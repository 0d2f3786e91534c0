"""How far the student is from the teacher on prompts that it is not trained on."""

from dataclasses import dataclass
from typing import Any

import torch

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo.models import Models
from topd_demo.prompts import encode
from topd_demo.settings import Settings

SAMPLES = 4


@dataclass
class Evaluation:
    """How far the student was from the teacher.

    Attributes:
        reverse_kl: KL(p_S || p_T), the mean over the tokens of the student's responses, nats.
        samples: the first prompts with the student's responses.
    """

    reverse_kl: float
    samples: list[list[str]]

    def numbers(self) -> dict[str, float]:
        """Return what a record holds of it."""
        return {"held_out_reverse_kl": self.reverse_kl}


@torch.no_grad()
def evaluate(models: Models, prompts: list[str], settings: Settings) -> Evaluation:
    """Compare both models on responses that the student samples now, from the same seed every time."""
    batch = held_out_batch(models, prompts, settings)
    objective = topd.OPD(models.student, models.teacher, allow_unequal_vocabularies=True)(batch)  # padding beyond the tokenizer
    texts = [
        models.tokenizer.decode(ids[response], skip_special_tokens=True)
        for ids, response in zip(batch["input_ids"][:SAMPLES], batch["response_mask"][:SAMPLES].bool(), strict=True)
    ]
    return Evaluation(objective.loss.item(), [[prompt, text] for prompt, text in zip(prompts, texts, strict=False)])


def held_out_batch(models: Models, prompts: list[str], settings: Settings) -> dict[str, Any]:
    """Sample rollouts of the student on the held-out prompts."""
    ids, attended = encode(models.tokenizer, prompts, torch.device(settings.device))
    torch.manual_seed(settings.seed)
    options = {"max_new_tokens": settings.held_out_tokens, "vocabulary": models.common_vocabulary}
    return sample_rollouts(models.student, ids, attended, **options)
