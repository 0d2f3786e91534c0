"""OPD and TOPD: the teacher reads what the student reads, and judges every token of the student's answers."""

from typing import Any

import torch
from torch import Tensor

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo.evaluation import Evaluation, evaluate
from topd_demo.models import Models
from topd_demo.prompts import Prompts, encode
from topd_demo.settings import Settings
from topd_demo.window_pair import WindowPair, furthest_pair


class PlainMethod:
    """OPD or TOPD, of the student of `models`.

    Args:
        start: the student's weights to start from.
    """

    evaluation_type: type = Evaluation

    def __init__(self, name: str, models: Models, start: dict[str, Tensor], prompts: Prompts, settings: Settings) -> None:
        self.name, self.models, self.prompts, self.settings = name, models, prompts, settings
        self.student = models.student
        self.student.load_state_dict(start)
        pair = models.student, models.teacher
        if name == "topd":  # the tokenizers are equal, padding beyond them need not be
            config = topd.TOPDConfig(horizon=settings.horizon)
            self.objective: topd.OPD | topd.TOPD = topd.TOPD(*pair, config, allow_unequal_vocabularies=True)
        else:
            self.objective = topd.OPD(*pair, allow_unequal_vocabularies=True)

    def batch(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the student's rollouts of a step."""
        settings, first = self.settings, index * self.settings.batch
        prompts = self.prompts.train[first : first + settings.batch]
        ids, attended = encode(self.models.tokenizer, prompts, torch.device(settings.device))
        options: dict[str, Any] = {"max_new_tokens": settings.tokens, "vocabulary": self.models.common_vocabulary}
        return sample_rollouts(self.student, ids, attended, **options), {}

    def evaluate(self, first: bool) -> Evaluation:
        """Compare both models on the held-out prompts."""
        return evaluate(self.models, self.prompts.held_out, self.settings, first)

    def window_pair(self, objective: topd.Objective, batch: dict[str, Tensor]) -> WindowPair | None:
        """Return TOPD's two windows of the step that are furthest apart."""
        if objective.near_future is None:
            return None
        return furthest_pair(objective.near_future, batch["input_ids"], self.models.tokenizer)
