"""Rollouts of the student, both models' pass over them, and the tokens looked at: of high loss, random, of low loss."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import topd
from topd.branching.prefill import Prefill, prefill
from topd.checks.rollouts import end_tokens
from topd.integrations.rollouts import sample_rollouts
from topd.models.decoder import Decoder, decoder_of

CLASSES = ("high", "random", "low")
FEWEST = 10  # tokens of a trajectory that can be looked at: those with fewer are left out


@dataclass(frozen=True)
class Settings:
    """What the numbers of a probe depend on, beside the models and the prompts.

    Attributes:
        without: layers of the teacher that the student lacks.
        temperature: of rollouts and windows.
        horizon: K, tokens of a window.
        tokens: the most tokens of a rollout.
        share: of a trajectory's tokens that are of high loss; as many are drawn at random, and as many are of low loss.
        seed: of prompts, rollouts, random tokens and windows.
    """

    without: int
    temperature: float
    horizon: int = 20
    tokens: int = 96
    share: float = 0.0225
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    @property
    def horizons(self) -> tuple[int, ...]:
        """The windows' lengths at which distances are taken: a quarter and a half of K, and K."""
        return tuple(sorted({max(1, self.horizon // 4), max(1, self.horizon // 2), self.horizon}))


class Passes(NamedTuple):
    """Rollouts [B, T], and both models' pass over them, whose caches the windows grow from."""

    input_ids: Tensor
    attended: Tensor
    response: Tensor
    student: Decoder
    teacher: Decoder
    student_states: Prefill
    teacher_states: Prefill

    @property
    def ends(self) -> list[int]:
        """The tokens at which a response ends."""
        return end_tokens(None, self.student.model, self.teacher.model)


@torch.no_grad()
def sample_and_read(student: Any, teacher: Any, prompts: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Passes:
    """Let the student continue the prompts, input_ids and attention_mask [B, P], and both models read what came of it."""
    torch.manual_seed(seed)
    batch = sample_rollouts(student, *prompts, max_new_tokens=settings.tokens, temperature=settings.temperature)
    ids, attended, response = (batch[name] for name in ("input_ids", "attention_mask", "response_mask"))
    attended, response = attended.bool(), response.bool()
    decoders = decoder_of(student), decoder_of(teacher)
    states = (prefill(decoder, ids, attended, cache=True) for decoder in decoders)
    return Passes(ids, attended, response, *decoders, *states)


def scores_of(passes: Passes) -> dict[str, Tensor]:
    """Return teacher_nll, student_nll and reverse_kl [B, T] at temperature 1, nats: column t speaks of token t; else 0."""
    scores = topd.score_tokens(
        passes.student_states.hidden,
        passes.student.head,
        passes.teacher_states.hidden,
        passes.teacher.head,
        tokens=passes.input_ids.roll(-1, 1),
        mask=topd.next_token_mask(passes.response),
    )
    assert scores.teacher_logprob is not None
    assert scores.student_logprob is not None
    columns = {"teacher_nll": -scores.teacher_logprob, "student_nll": -scores.student_logprob, "reverse_kl": scores.reverse_kl}
    return {name: value.roll(1, 1) for name, value in columns.items()}


def eligible(passes: Passes, horizon: int) -> Tensor:
    """Return which tokens can be looked at, [B, T] bool: the rollout goes on for K tokens from there, or ends by itself.

    Where the limit of tokens cuts a rollout off, its last windows would be short for no reason of the student's. Trajectories
    with fewer than FEWEST such tokens are left out.
    """
    left = passes.response.long().flip(-1).cumsum(-1).flip(-1)
    last = passes.response.long().cumsum(-1).argmax(-1, keepdim=True)
    ended = torch.isin(passes.input_ids.gather(1, last), torch.tensor(passes.ends, dtype=torch.int64))
    kept = passes.response & ((left >= horizon) | ended)
    return kept & (kept.sum(-1, keepdim=True) >= FEWEST)


def pick(loss: Tensor, mask: Tensor, share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the positions [m, 2] of each class: as many of the highest loss in each trajectory as of the lowest and at random.

    A random token may be one of high or low loss too.
    """
    scores = {"high": loss, "random": torch.rand(loss.shape, generator=generator), "low": -loss}
    return {name: topd.select_candidates(scores[name], mask=mask, rule="top_fraction", value=share) for name in CLASSES}
