"""A teacher of whom only the k most likely tokens of each position are known, as a server returns them, in a model's place.

    L = mean over response tokens of KL between the student and the teacher's k tokens, with `topk_divergence`

The student's one forward, the divergence, and one pass without gradients for the scores. Everything is indexed by the token:
teacher_topk_ids[:, t] are the likely tokens in place of input_ids[:, t].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.distributions import check_ids_in_vocabulary, check_topk_values, checks_values
from topd.checks.tokens import TOPK_ORDER
from topd.checks.values import FLOATING, check_tensor
from topd.divergences import ForwardKL, ReverseKL, resolve_divergence
from topd.head import Head
from topd.losses.linear_logprobs import linear_logprobs
from topd.losses.topk_divergence import topk_divergence
from topd.losses.topk_logprobs import TopK
from topd.objectives.batch import check_tokens, open_student
from topd.objectives.config import OPDConfig
from topd.objectives.inputs import Inputs
from topd.objectives.metrics import Stages
from topd.objectives.reduction import reduction_hint
from topd.objectives.rows import by_token, scores_by_token
from topd.objectives.token_losses import TokenLosses, clipped
from topd.options import Direction
from topd.scores import TokenScores

TOPK_KEYS = ("teacher_topk_logprobs", "teacher_topk_ids")


class TopKLosses(NamedTuple):
    """What each response token costs, and the teacher's mass on its k tokens, [B, T] or [N], 0 elsewhere."""

    tokens: TokenLosses
    mass: Tensor


def direction_of(config: OPDConfig) -> Direction:
    """Return the `topk_divergence` direction of a configuration; refuse what a top-k does not determine."""
    if config.top_k is not None:
        raise ValueError(
            f"config.top_k chooses among a teacher model's tokens, got {config.top_k} and teacher=None, whose batches hold the "
            "tokens already; leave it out, or pass a teacher model"
        )
    for name in ("epistemic_ids", "teacher_top2"):
        if getattr(config, name):
            raise ValueError(
                f"config.{name} measures a teacher model's distributions, got {getattr(config, name)} and teacher=None, of "
                "which only the top-k is known; leave it out, or pass a teacher model"
            )
    divergence = resolve_divergence(config.divergence)
    if divergence == ForwardKL():
        return "forward"
    if divergence == ReverseKL():
        return "reverse"
    raise ValueError(
        'config.divergence must be "forward_kl" (without an entry_clip) or "reverse_kl" where only the teacher\'s top-k is '
        f"known (teacher=None), got {divergence}; take one of these, or a teacher model"
    )


def refuse_topk(batch: object, method: str) -> None:
    """Refuse a teacher's top-k where a model is asked."""
    for key in TOPK_KEYS:
        if isinstance(batch, Mapping) and key in batch:
            raise ValueError(
                f"batch must hold no {key} where topd.{method} has a teacher model, got it; leave it out, or give "
                "topd.OPD(student, None, config) the top-k in the model's place"
            )


def take_topk(batch: Mapping[str, Any]) -> tuple[TopK, dict[str, Any]]:
    """Return the teacher's top-k of a batch, not yet checked, and the rest of the batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    rest = dict(batch)
    for key in TOPK_KEYS:
        if key not in rest:
            raise ValueError(
                f"batch must hold {' and '.join(TOPK_KEYS)} where teacher is None, got no {key}; it has {sorted(batch)}; "
                "add the teacher's top-k (topd.pad_topk makes it from a server's answers), or give a teacher model"
            )
    return TopK(*(rest.pop(key) for key in TOPK_KEYS)), rest


def check_topk(topk: TopK, input_ids: Tensor, response: Tensor, vocab: int) -> TopK:
    """Check the top-k [..., k] for tokens [...], and return it; values are checked on the CPU, where response is True."""
    ids = topk.ids
    if isinstance(ids, Tensor) and ids.is_floating_point():
        raise TypeError(f"teacher_topk_ids must be torch.int64, got {ids.dtype}; {TOPK_ORDER}")
    device = (input_ids.device, "input_ids")
    ids = check_tensor("teacher_topk_ids", ids, dtype=torch.int64, device=device)
    expected = (*input_ids.shape, ids.shape[-1] if ids.dim() == input_ids.dim() + 1 else "k")
    if tuple(ids.shape) != expected or not ids.shape[-1]:
        raise ValueError(
            f"teacher_topk_ids must be [{', '.join(map(str, input_ids.shape))}, k], k >= 1 tokens for each of input_ids, got "
            f"{list(ids.shape)}; column t speaks of the token input_ids[:, t]"
        )
    shape = (ids.shape, "as teacher_topk_ids")
    logprobs = check_tensor("teacher_topk_logprobs", topk.logprobs, dtype=FLOATING, shape=shape, device=device)
    if logprobs.requires_grad:
        raise ValueError("teacher_topk_logprobs must not require grad: the teacher is a constant; pass it detached")
    if not checks_values(response):
        return TopK(logprobs, ids)
    counted = logprobs.masked_fill(~response.unsqueeze(-1), -torch.inf)
    if (bad := response & logprobs.isneginf().all(-1)).any():
        raise ValueError(
            "teacher_topk_logprobs must hold a token wherever response_mask is True, got -inf alone at "
            f"{bad.nonzero()[0].tolist()}; does column t speak of the token input_ids[:, t]? Else take it out of response_mask"
        )
    check_ids_in_vocabulary("teacher_topk_ids", ids, ~counted.isneginf(), vocab)
    check_topk_values("teacher_topk_ids", ids, "teacher_topk_logprobs", counted)
    return TopK(logprobs, ids)


def topk_losses(student_model: Any, inputs: Inputs, topk: TopK, config: OPDConfig, stages: Stages) -> TopKLosses:
    """Run the student over the rollouts and compare it with the teacher's top-k."""
    batch = inputs.rollouts
    student = open_student(student_model, batch)
    topk = check_topk(topk, batch.input_ids, batch.response, student.vocab)
    check_tokens(batch, student=student_model)
    with stages.stage("student_forward"):
        hidden = batch.hidden(student)
    stages.observer.tensor("student_hidden", hidden)
    with stages.stage("divergence"):
        return compare_topk(hidden, student.head, inputs, topk, config)


def compare_topk(hidden: Tensor, head: Head, inputs: Inputs, topk: TopK, config: OPDConfig) -> TopKLosses:
    """Compare states [..., T, H] with the tokens one column later. Costs `topk_divergence`, one matrix product for the scores,
    and for hard_weight three more (two with a frozen head)."""
    batch = inputs.rollouts
    states, mask, next_tokens = hidden[..., :-1, :], batch.response[..., 1:], batch.input_ids[..., 1:]
    logprobs, ids = topk.logprobs[..., 1:, :], topk.ids[..., 1:, :]
    hint = reduction_hint(batch, config.reduction, inputs.token_weights)
    options: dict[str, Any] = {"temperature": config.temperature, "mask": mask}
    options["weights_hint"] = None if hint is None else hint[..., 1:]
    direction = direction_of(config)
    loss = topk_divergence(states, head, ids, logprobs, direction=direction, support=config.topk_support, **options)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.hard_weight > 0):
        own = linear_logprobs(states, head, next_tokens.unsqueeze(-1), return_entropy=True, **options)
    assert isinstance(own, tuple)
    student_logprob, student_entropy = own[0][..., 0], own[1]
    if config.hard_weight:
        loss = loss - config.hard_weight * student_logprob
    scores = _scores(student_logprob.detach(), student_entropy.detach(), next_tokens, mask, TopK(logprobs, ids))
    mass = logprobs.double().exp().sum(-1).masked_fill(~mask, 0.0)
    turn = partial(by_token, columns=batch.input_ids.shape[-1])
    loss = turn(loss)
    return TopKLosses(TokenLosses(clipped(loss, config), scores_by_token(scores, turn), loss.detach()), turn(mass))


def _scores(logprob: Tensor, entropy: Tensor, tokens: Tensor, mask: Tensor, topk: TopK) -> TokenScores:
    """Return what is known of each token, NaN or None where a top-k does not say it."""
    unknown = torch.zeros_like(logprob).masked_fill(mask, torch.nan)
    same = (topk.ids == tokens.unsqueeze(-1)) & ~topk.logprobs.isneginf()
    known = topk.logprobs.masked_fill(~same, -torch.inf).amax(-1).to(logprob.dtype)
    teacher_logprob = torch.where(mask & same.any(-1), known, unknown)
    names = ("forward_kl", "reverse_kl", "teacher_entropy", "student_lost_mass", "teacher_lost_mass")
    known_of_student = {"student_entropy": entropy, "student_logprob": logprob}
    return TokenScores(
        **dict.fromkeys(names, unknown), **known_of_student, teacher_logprob=teacher_logprob, top1_agreement=None
    )
