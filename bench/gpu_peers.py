"""Shapes and contenders of `python -m bench.gpu`: bench.peers' on a device, in the models' dtype, eager code through
float32 logits, and the fused losses of TRL and Liger as their trainers call them on a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import topd
from bench import agreement, logprob_peers, peers
from bench.cases import LOGIT_SPREAD, TEACHER_NOISE, Case, Inputs
from bench.peers import Gradients
from topd.ops.shared.plan import FUSED_BLOCK

TOKENS = 8192
LOSSES = ("reverse_kl", "jsd", "logprobs_1", "logprobs_50")
GIB = 1 << 30


class Chosen(NamedTuple):
    """ids [N, M] and the weights of their log-probabilities [N, M]."""

    ids: Tensor
    probs: Tensor


def needed_bytes(case: Case, itemsize: int) -> int:
    """Inputs, and the most that the floor or a chunked loss needs beside them: both sides' logits or a workspace of 2 GiB and a
    float32 d weight, and the gradients."""
    student = case.vocab * case.student_width
    states = case.n * (case.student_width + case.teacher_width)
    inputs = itemsize * (states + student + case.vocab * case.teacher_width)
    gradients = itemsize * (student + case.n * case.student_width)
    logits = 2 * case.n * case.vocab * itemsize
    chunked = 2 * GIB + 4 * (student + case.n * case.student_width)
    return inputs + gradients + max(logits, chunked)


def fitted(case: Case, free_bytes: int, itemsize: int) -> tuple[Case, str]:
    """The case with as many tokens, halved as often as it takes, as fit in nine tenths of the memory; what was done."""
    found = case
    while found.n > 256 and needed_bytes(found, itemsize) > 0.9 * free_bytes:
        found = replace(found, n=found.n // 2)
    if found.n == case.n:
        return case, ""
    have, need = free_bytes / GIB, needed_bytes(case, itemsize) / GIB
    return found, f"{case.name}: N reduced from {case.n} to {found.n}: {have:.1f} GiB free, N = {case.n} needs {need:.1f} GiB"


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """As bench.cases.make_inputs, made on the device; the weight's requires_grad is set line by line."""
    generator = torch.Generator(device).manual_seed(seed)
    scale = LOGIT_SPREAD / case.student_width**0.5

    def normal(rows: int, width: int, deviation: float) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device).normal_(0.0, deviation, generator=generator)

    def near(student: Tensor, width: int, deviation: float) -> Tensor:
        shared, teacher = min(width, student.shape[1]), normal(student.shape[0], width, TEACHER_NOISE * deviation)
        teacher[:, :shared].add_(student[:, :shared])
        return teacher

    hidden, weight = normal(case.n, case.student_width, 1.0), normal(case.vocab, case.student_width, scale)
    teacher = near(hidden, case.teacher_width, 1.0), near(weight, case.teacher_width, scale)
    return Inputs(hidden.requires_grad_(), weight, *teacher, case.workspace_bytes)


def chosen_of(inputs: Inputs, loss: str) -> Chosen:
    """bench.logprob_peers' targets, on the device; none for a divergence."""
    device = inputs.student_hidden.device
    if peers.has_teacher(loss):
        return Chosen(torch.empty(0, 0, dtype=torch.int64, device=device), torch.empty(0, 0, device=device))
    return Chosen(*(part.to(device) for part in logprob_peers.targets(inputs, loss)))


def loss_of_logits(loss: str, student: Tensor, teacher: Tensor | None, chosen: Chosen) -> Tensor:
    """[N] by the usual formulas, in the logits' dtype."""
    logprobs = student.log_softmax(-1)
    if teacher is not None:
        return peers.divergence_of_logprobs(logprobs, teacher.log_softmax(-1), loss)
    return -(chosen.probs * logprobs.gather(-1, chosen.ids)).sum(-1)


def full_logits(
    loss: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, ids: Tensor, probs: Tensor
) -> Tensor:
    """Eager code as it is written: logits in the models' dtype, widened to float32, log_softmax, the usual formula."""
    student = F.linear(hidden, weight).float()
    if not peers.has_teacher(loss):
        if ids.shape[1] == 1:
            return F.cross_entropy(student, ids[:, 0], reduction="none")
        return loss_of_logits(loss, student, None, Chosen(ids, probs))
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight).float()
    return loss_of_logits(loss, student, teacher, Chosen(ids, probs))


def _gradients(run: Callable[[], Tensor], inputs: Inputs) -> Gradients:
    return peers.gradients_of_mean(run(), inputs)


def _operands(inputs: Inputs, chosen: Chosen) -> tuple[Tensor, ...]:
    return (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, *chosen)


def _liger(inputs: Inputs, loss: str, chosen: Chosen) -> Tensor:
    """Liger's fused linear losses, which give a mean."""
    if peers.has_teacher(loss):
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        sides = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
        return torch.as_tensor(LigerFusedLinearJSDFunction.apply(*sides, None, peers.TRL_BETA[loss]))
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(inputs.student_hidden, inputs.student_weight, chosen.ids[:, 0])
    return torch.as_tensor(found[0])


def differentiable(inputs: Inputs, loss: str, chosen: Chosen, *, compiled: bool) -> dict[str, Callable[[], Gradients]]:
    """The contenders that give a loss and its gradients. TRL and Liger know one token a row."""
    single = peers.has_teacher(loss) or chosen.ids.shape[1] == 1
    found: dict[str, Callable[[], Gradients]] = {}
    if peers.has_teacher(loss):
        found["ours"] = partial(peers.ours, inputs, loss, "triton")
    else:
        found["ours"] = partial(_gradients, partial(logprob_peers.ours, inputs, *chosen, "triton"), inputs)
    found["eager"] = partial(_gradients, partial(full_logits, loss, *_operands(inputs, chosen)), inputs)
    if compiled:
        torch.compiler.reset()  # after eight variants torch would run eager code in silence
        function: Callable[..., Tensor] = torch.compile(full_logits, dynamic=False)
        found["torch.compile"] = partial(_gradients, partial(function, loss, *_operands(inputs, chosen)), inputs)
    if single and importlib.util.find_spec("trl"):
        trl = partial(peers.trl, inputs, loss)
        found["trl"] = (
            trl if peers.has_teacher(loss) else partial(_gradients, partial(logprob_peers.trl, inputs, chosen.ids), inputs)
        )
    if single and importlib.util.find_spec("liger_kernel"):
        found["liger"] = partial(_gradients, partial(_liger, inputs, loss, chosen), inputs)
    return found


def floor_of_scores(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Two matrix products."""
    with torch.no_grad():
        student = torch.mm(inputs.student_hidden, inputs.student_weight.T)
        return student, torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T)


def eager_scores(inputs: Inputs) -> Tensor:
    """Both KLs and entropies from full logits."""
    with torch.no_grad():
        s, t = (logits.float().log_softmax(-1) for logits in floor_of_scores(inputs))
        p, q = s.exp(), t.exp()
        return torch.stack([(q * (t - s)).sum(-1), (p * (s - t)).sum(-1), -(p * s).sum(-1), -(q * t).sum(-1)])


def our_scores(inputs: Inputs) -> Tensor:
    """topd.score_tokens, the first four of its fields."""
    sides = (inputs.student_hidden, topd.Head(inputs.student_weight), inputs.teacher_hidden, topd.Head(inputs.teacher_weight))
    found = topd.score_tokens(*sides)
    return torch.stack([found.forward_kl, found.reverse_kl, found.student_entropy, found.teacher_entropy])


def fused_scores(inputs: Inputs) -> Tensor:
    """The same by the fused kernel, which a workspace for few rows asks for."""
    student, teacher = topd.Head(inputs.student_weight.detach()), topd.Head(inputs.teacher_weight)
    sides = (inputs.student_hidden.detach(), student, inputs.teacher_hidden, teacher)
    few = FUSED_BLOCK * 4 * (inputs.student_weight.shape[0] + inputs.teacher_weight.shape[0])
    _, found = topd.linear_divergence(
        *sides, divergence="forward_kl", return_scores=True, workspace_bytes=few, backend="triton"
    )
    assert isinstance(found, topd.TokenScores)
    return torch.stack([found.forward_kl, found.reverse_kl, found.student_entropy, found.teacher_entropy])


def truth(inputs: Inputs, loss: str, chosen: Chosen, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 values of some rows and, for a divergence, d mean / d hidden there."""
    if peers.has_teacher(loss):
        with inputs.student_hidden.device:
            value, hidden = agreement.truth(inputs, loss, rows)
        return value, hidden
    with torch.no_grad():
        blocks = inputs.student_weight.split(agreement.VOCAB_BLOCK)
        logits = torch.cat([inputs.student_hidden[rows].double() @ block.double().T for block in blocks], dim=1)
        return loss_of_logits(loss, logits, None, Chosen(chosen.ids[rows], chosen.probs[rows].double())), None
