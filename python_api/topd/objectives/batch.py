"""What every objective starts from: a checked batch, one pass of each model, and what each token costs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.branching.prefill import Prefill, prefill
from topd.checks.rollouts import binary, check_differentiable, check_ids, check_rollouts
from topd.checks.values import keepable, real
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.models.decoder import Decoder, decoder_of
from topd.objectives.config import OPDConfig
from topd.scores import TokenScores


@dataclass(frozen=True, eq=False)
class Rollouts:
    """[B, T]: tokens int64; attended and response bool. Column t is about token t, whose state is at t - 1."""

    input_ids: Tensor
    attended: Tensor
    response: Tensor


KEYS = ("input_ids", "attention_mask", "response_mask")


class TokenPass(NamedTuple):
    """Both models' pass over the rollouts: the loss of each response token [B, T], 0 elsewhere, and its scores."""

    student: Decoder
    teacher: Decoder
    student_states: Prefill
    teacher_states: Prefill
    loss: Tensor
    scores: TokenScores


class Stages:
    """Wall time of the stages, in seconds; on a GPU that of the host. Those named here stand at 0 where they do not run."""

    def __init__(self, *names: str) -> None:
        self.seconds = {f"seconds_{name}": 0.0 for name in names}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


def check_batch(batch: object) -> Rollouts:
    """input_ids, attention_mask and response_mask of a batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    if "cu_seqlens" in batch:
        raise ValueError(
            "batch must be padded, input_ids [B, T], where windows branch off the rollouts, got a packed one with cu_seqlens; "
            "pad it and give attention_mask, or take topd.OPD"
        )
    for key in KEYS:
        if key not in batch:
            raise ValueError(
                f"batch must hold input_ids, attention_mask and response_mask, got no {key}; it has {sorted(batch)}"
            )
    ids, attended = check_rollouts(batch["input_ids"], batch["attention_mask"])
    response = binary("response_mask", batch["response_mask"], ids, "input_ids")
    before = torch.zeros_like(attended)
    before[:, 1:] = attended[:, :-1]
    bad = response & ~(attended & before)
    if bad.device.type == "cpu" and bad.any():
        raise ValueError(
            "response_mask must be True only where the token and the one before it are attended, got True at "
            f"{bad.nonzero()[0].tolist()}; a response follows a prompt, and padding is no response"
        )
    return Rollouts(ids, attended, response)


def check_keys(batch: object, keys: tuple[str, ...]) -> None:
    """Check that a batch holds nothing that the objective would not read."""
    for key in batch if isinstance(batch, Mapping) else ():
        if key not in keys:
            hint = "; positions follow from attention_mask or cu_seqlens" if key == "position_ids" else ""
            raise ValueError(f"batch may hold {', '.join(keys)}, got {key!r}, which is not read; leave it out{hint}")


def token_pass(
    student_model: Any, teacher_model: Any, rollouts: Rollouts, config: OPDConfig, stages: Stages, *, cache: bool
) -> TokenPass:
    """One forward of each model, the student's with gradient, and one `linear_divergence`.

    Args:
        cache: keep both models' caches for windows, where they allow it.
    """
    student, teacher = decoder_of(student_model), decoder_of(teacher_model)
    check_differentiable("student", student.model)
    check_ids("input_ids", rollouts.input_ids, student=student_model, teacher=teacher_model)
    ids, attended, response = rollouts.input_ids, rollouts.attended, rollouts.response

    def states(decoder: Decoder) -> Prefill:
        return prefill(decoder, ids, attended, cache=cache and not (decoder.obstacle or decoder.forbids_cache))

    with stages.stage("student_forward"):
        student_states = states(student)
    with stages.stage("teacher_forward"), torch.no_grad():
        teacher_states = states(teacher)
    hint = reduction_hint(response, config.reduction)
    with stages.stage("divergence"):
        loss, scores = compare_states(
            (student_states.hidden[:, :-1], student.head),
            (teacher_states.hidden[:, :-1], teacher.head),
            response[:, 1:],
            ids[:, 1:],
            hint,
            config,
        )
    columns = ids.shape[1]
    loss, scores = at_token(loss, columns), scores_at_token(scores, columns)
    return TokenPass(student, teacher, student_states, teacher_states, loss, scores)


def reduction_hint(response: Tensor, reduction: str) -> Tensor | None:
    """What `reduce_tokens` will multiply each of the states [B, T - 1] by, up to one factor; None where that is the same for
    all."""
    if reduction == "token":
        return None
    return (1.0 / response.sum(-1, keepdim=True).clamp_min(1)).expand(response.shape)[:, 1:]


def compare_states(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    response: Tensor,
    tokens: Tensor,
    hint: Tensor | None,
    config: OPDConfig,
) -> tuple[Tensor, TokenScores]:
    """The one `linear_divergence` of an objective: states paired with the tokens that they predict."""
    found = linear_divergence(
        *student,
        teacher[0],
        teacher[1].detach(),
        divergence=config.divergence,
        temperature=config.temperature,
        mask=response,
        tokens=tokens,
        hard_weight=config.hard_weight,
        weights_hint=hint,
        return_scores=True,
    )
    assert isinstance(found, tuple)
    return found


def at_token(value: Tensor, columns: int) -> Tensor:
    """Turn [..., T - 1], indexed by the state, into [..., T], indexed by the token; T may be 0."""
    return torch.cat([value.new_zeros(*value.shape[:-1], 1), value], dim=-1)[..., :columns]


def scores_at_token(scores: TokenScores, columns: int) -> TokenScores:
    given = {field.name: getattr(scores, field.name) for field in fields(scores)}
    shifted: dict[str, Any] = {name: None if value is None else at_token(value, columns) for name, value in given.items()}
    return TokenScores(**shifted)


def check_items(num_items: object) -> float | Tensor | None:
    """The denominator of a larger batch."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got {list(num_items.shape)}; sum it over the batch")
        if num_items.device.type == "cpu":
            real("num_items", num_items.item(), low=0.0, open_low=True)
        return keepable(num_items.reshape(()))
    return None if num_items is None else real("num_items", num_items, low=0.0, open_low=True)


class Reduced(NamedTuple):
    loss: Tensor
    share: Tensor  # of this batch in the larger one whose denominator was given; 1 without


def reduce_tokens(
    loss: Tensor, response: Tensor, reduction: str, num_items: float | Tensor | None, weights: Tensor | None = None
) -> Reduced:
    """Mean of [B, T] over response tokens, or over responses of their mean; weights never enter the denominator."""
    if weights is not None:
        loss = torch.where(weights == 0, 0.0, loss * weights)  # an infinite token that weighs nothing adds nothing
    counts = response.sum(-1)
    if reduction == "token":
        total, own = loss.sum(), counts.sum()
    else:
        total, own = (loss.sum(-1) / counts.clamp_min(1)).sum(), (counts > 0).sum()
    own = own.clamp_min(1).to(loss.dtype)
    denominator = own if num_items is None else num_items
    if isinstance(denominator, Tensor):
        denominator = denominator.to(loss.device)
    return Reduced(total / denominator, own / denominator)


def mean_scores(scores: TokenScores, response: Tensor) -> dict[str, Tensor]:
    """Return the means over the response tokens; 0 where there is none."""
    count = response.sum().clamp_min(1)
    names = ("student_entropy", "teacher_entropy", "student_lost_mass", "teacher_lost_mass")
    return {name: getattr(scores, name).sum() / count for name in names}


def as_metrics(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Float tensors without a gradient."""
    return {
        name: value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, value in values.items()
    }
