"""`linear_divergence`, the first primitive: its arguments are checked, leading shapes made flat, then the op runs."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from topd.checks.values import (
    FLOATING,
    check_range,
    check_temperature,
    check_tensor,
    check_workspace,
    flag,
    no_forward_mode,
    per_token,
    real,
)
from topd.divergences import Divergence, DivergenceLike, resolve_divergence
from topd.head import Head
from topd.losses.operands import autocast, check_head_range, check_side, kept_side, needs, op_side, softcap_of
from topd.losses.sharding import backend_of, checked_together, shard_of
from topd.ops.linear_divergence import full_logits
from topd.ops.linear_divergence import op as linear_divergence_op
from topd.ops.linear_divergence.spec import Call, RowSpec
from topd.ops.shared.engines import engine_of
from topd.options import BackendName
from topd.scores import TokenScores, unpack_scores


def _refuse_teacher_grad(teacher_hidden: Tensor, teacher: Head) -> None:
    """Refuse a teacher that would be differentiated."""
    if teacher_hidden.requires_grad:
        raise ValueError(
            "teacher_hidden must not require grad: the teacher is a constant; run the teacher under torch.no_grad(), or pass "
            "teacher_hidden.detach()"
        )
    for field, value in teacher.tensors().items():
        if value.requires_grad:
            raise ValueError(
                f"teacher.{field} must not require grad: the teacher is a constant; pass head.detach(), which shares storage, "
                "also where a model teaches itself"
            )


def _check_pair(student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head) -> None:
    """Check that each side's hidden states go with its head, and both sides with each other."""
    check_side("student_hidden", student_hidden, "student", student)
    device = (student_hidden.device, "student_hidden")
    if not (isinstance(teacher_hidden, Tensor) and teacher_hidden.device.type == "cpu"):  # from there a chunk's rows are copied
        check_tensor("teacher_hidden", teacher_hidden, device=device)
    check_side("teacher_hidden", teacher_hidden, "teacher", teacher, device=device)
    shape = ((*student_hidden.shape[:-1], teacher_hidden.shape[-1]), "the leading shape of student_hidden")
    check_tensor("teacher_hidden", teacher_hidden, shape=shape)
    _refuse_teacher_grad(teacher_hidden, teacher)


def _check_options(
    temperature: object, hard_weight: object, tokens: object, return_scores: object, workspace_bytes: object
) -> None:
    """Check what can be checked without the tensors."""
    check_temperature(temperature)
    flag("return_scores", return_scores)
    if real("hard_weight", hard_weight, low=0.0) and tokens is None:
        raise ValueError(
            "hard_weight needs tokens, the sampled tokens [...] int64, got tokens=None; pass them or leave it at 0"
        )
    check_workspace(workspace_bytes)


def _check_numbers(
    student: Head, teacher: Head, temperature: float, divergence: Divergence, hard_weight: float, dtype: torch.dtype
) -> None:
    """Check that the tiles' dtype holds every number that the kernels compute with."""
    check_range("temperature", temperature, dtype)
    check_range("hard_weight", hard_weight, dtype)
    if divergence.parameter != math.inf:
        check_range(f"{divergence.parameter_name} of {divergence.name!r}", divergence.parameter, dtype)
    check_head_range("student", student, temperature, dtype)
    check_head_range("teacher", teacher, temperature, dtype)


def spec_of(student: Head, teacher: Head, temperature: float, divergence: Divergence, hard_weight: float) -> RowSpec:
    """Return the numbers that the op computes each row with."""
    return RowSpec(
        float(student.scale),
        softcap_of(student),
        float(teacher.scale),
        softcap_of(teacher),
        float(temperature),
        divergence.name,
        divergence.parameter,
        float(hard_weight),
    )


@overload
def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    divergence: DivergenceLike = "reverse_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tokens: Tensor | None = None,
    hard_weight: float = 0.0,
    weights_hint: Tensor | None = None,
    return_scores: Literal[False] = False,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor: ...


@overload
def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    divergence: DivergenceLike = "reverse_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tokens: Tensor | None = None,
    hard_weight: float = 0.0,
    weights_hint: Tensor | None = None,
    return_scores: Literal[True],
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, TokenScores]: ...


@overload
def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    divergence: DivergenceLike = "reverse_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tokens: Tensor | None = None,
    hard_weight: float = 0.0,
    weights_hint: Tensor | None = None,
    return_scores: bool,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, TokenScores]: ...


def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    divergence: DivergenceLike = "reverse_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tokens: Tensor | None = None,
    hard_weight: float = 0.0,
    weights_hint: Tensor | None = None,
    return_scores: bool = False,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, TokenScores]:
    """Return the divergence between a student and a teacher for each token, from hidden states, without [N, V] logits.

    Exact value and gradients for any upstream gradient, at the cost of four matrix products (three with a frozen head).

    Args:
        student_hidden: [..., H_s] float32, float64, bfloat16 or float16, dtype of `student.weight`; differentiated.
        student: Head; weight, bias and adapter are differentiated where they require grad.
        teacher_hidden: [..., H_t], the same leading shape, dtype of `teacher.weight`; constant. May be in CPU memory beside a
            student on a GPU: then the rows of a chunk are copied when it is computed. Pinned memory is the fastest.
        teacher: Head; constant. Vocabularies that differ are compared on their first min(V_s, V_t) entries.
            Both heads may be sharded over one group of processes: then all ranks make the same call on the same hidden states,
            and get the same value, the whole d student_hidden and d adapter.a, and the other gradients of their own tokens.
            With VocabShard(sequence_parallel=True) each rank has rows of its own, and gets the results of these rows.
        divergence: a name, a `topd` divergence or a mapping of its name and parameters, e.g. "reverse_kl", topd.JSD(0.3),
            {"name": "jsd", "beta": 0.3}, topd.ForwardKL(entry_clip=0.05).
        temperature: > 0; both sides' logits are divided by it, after the softcap; no factor temperature².
        mask: [...] bool; False rows cost nothing, are exactly 0 and get exactly 0 gradient, whatever they hold.
        tokens: [...] int64, the sampled tokens; read for hard_weight and the scores' log-probabilities. Unmasked tokens lie
            in the common vocabulary: checked on the CPU; on a GPU, where a check would stall it, such a token has
            log-probability -inf.
        hard_weight: >= 0; adds hard_weight * (-log p_S(tokens)) to each row, in the same pass.
        weights_hint: [...] floating, what the result will be multiplied by, up to one factor: where it is right the backward
            pass costs nothing more; it never changes a value.
        return_scores: also return `TokenScores`.
        workspace_bytes: bound for the tiles of logits; None: 512 MiB on a CPU, 256 where it multiplies bfloat16; on a GPU what
            chunks of 4,096 rows need, within the largest power of two in a quarter of the memory that is available.
        backend: None (by device), "reference", "eager", "cpp" or "triton"; one asked for by name never falls back. Sharded
            heads run on "eager".

    Returns:
        [...] float32 (float64 if an input is), nats per token (a probability for "total_variation"); with return_scores a pair
        of it and `TokenScores`. -inf logits mean probability 0: a row is inf where its divergence is, never NaN.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option, a number that overflows or vanishes in the
            dtype of the result, or a teacher tensor that requires grad.

    Source: reverse KL: arXiv 2606.00305 (OPD); forward KL: arXiv 2606.08432, eq. 6; entry clip: arXiv 2601.18734.
    """
    with checked_together(student, teacher) as pact:
        chosen = resolve_divergence(divergence)
        _check_pair(student_hidden, student, teacher_hidden, teacher)
        _check_options(temperature, hard_weight, tokens, return_scores, workspace_bytes)
        heads = (*student.tensors().values(), *teacher.tensors().values())
        no_forward_mode("linear_divergence", (student_hidden, teacher_hidden, *heads))
        student_hidden, student = kept_side("student_hidden", student_hidden, "student", student)
        teacher_hidden, teacher = kept_side("teacher_hidden", teacher_hidden, "teacher", teacher)
        shape = tuple(student_hidden.shape[:-1])
        like = (student_hidden, "student_hidden")
        flat_mask = None if mask is None else per_token("mask", mask, torch.bool, *like)
        flat_tokens = None if tokens is None else per_token("tokens", tokens, torch.int64, *like)
        hint = None if weights_hint is None else per_token("weights_hint", weights_hint, FLOATING, *like).detach()
        shard = shard_of(student)
        if shard.sequence:  # the ranks send each other rows: from the memory of the student
            teacher_hidden = teacher_hidden.to(student_hidden.device)
        name = backend_of(backend, student_hidden.device, shard)

        student_hidden, student = autocast(student_hidden.reshape(-1, student_hidden.shape[-1]), student)
        teacher_hidden, teacher = autocast(teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher)
        dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
        _check_numbers(student, teacher, temperature, chosen, hard_weight, dtype)
        spec = spec_of(student, teacher, temperature, chosen, hard_weight)
        if pact is not None:
            options = (spec, return_scores, None if hint is None else hint.dtype, teacher_hidden.dtype)
            pact.sign(student_hidden, student, teacher, options, flat_tokens, flat_mask)
    if name == "reference":
        sides = (student_hidden, student, teacher_hidden.to(student_hidden.device), teacher)
        value, scores = full_logits.linear_divergence(*sides, flat_mask, flat_tokens, spec)
    else:
        both = op_side(student_hidden, student), op_side(teacher_hidden, teacher)
        operands = Call(*both, flat_mask, flat_tokens, spec, workspace_bytes, engine_of(name), shard=shard)
        wanted = needs(student_hidden, student)
        value, scores = linear_divergence_op.linear_divergence(operands, hint, wanted, scores=return_scores)
    value = value.reshape(shape)
    return (value, unpack_scores(scores, shape, has_tokens=tokens is not None)) if return_scores else value
