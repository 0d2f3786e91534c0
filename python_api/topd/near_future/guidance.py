"""TOPD's guidance: at a divergent point the student learns its teacher's next tokens, spread by the transport plan."""

import torch
from torch import Tensor

from topd.checks.distributions import check_ids_in_vocabulary, check_targets, checks_values
from topd.checks.values import FLOATING, check_constant, check_tensor
from topd.head import Head
from topd.losses.operands import check_side, vocabulary_of
from topd.losses.sharding import passed_together
from topd.losses.soft_targets import soft_target_kl
from topd.near_future.transport import window_lengths
from topd.options import BackendName


def guidance_kl(
    window_hidden: Tensor,
    head: Head,
    teacher_tokens: Tensor,
    plan: Tensor,
    *,
    student_lengths: Tensor | None = None,
    temperature: float = 1.0,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Return the multi-token guidance of each divergent point, the mean over the student's window of KL(target_i || p_S).

    target_i spreads row i of the plan, normalised, over the teacher's tokens. A token at several places counts once.

    Args:
        window_hidden: [m, K_s, H] floating, the states that predict each token of the student's windows; differentiated.
        head: the student's Head, also sharded, as in `linear_logprobs`.
        teacher_tokens: [m, K_t] int64; where the plan is 0 they are never read.
        plan: [m, K_s, K_t] floating, >= 0, constant, as `near_future_divergence` returns it.
        student_lengths: [m] int64, 1 <= length <= K_s; positions at and past it contribute 0. None: all of the window counts.
        temperature: > 0, of the student.
        weights_hint: [m] floating, what the result will be multiplied by, up to one factor: speed alone.
        workspace_bytes, backend: as in `linear_logprobs`.

    Returns:
        [m] float32 (float64 for float64), nats; 3 matrix products over m K_s rows (2 with a frozen head).

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option; on the CPU also a row of the plan within the
            lengths that sums to 0.

    Source: arXiv 2606.00305, L_traj with uniform marginals.
    """
    with passed_together(head):
        check_side("window_hidden", window_hidden, "head", head, may_be_sharded=True)
        states = check_tensor("window_hidden", window_hidden)
        if states.dim() != 3:
            raise ValueError(f"window_hidden must be [m, K_s, H], got {list(states.shape)}")
        m, window, _ = states.shape
        device = (states.device, "window_hidden")
        tokens = check_tensor("teacher_tokens", teacher_tokens, dtype=torch.int64, device=device)
        if tokens.dim() != 2 or tokens.shape[0] != m:
            raise ValueError(f"teacher_tokens must be [{m}, K_t], m as in window_hidden, got {list(tokens.shape)}")
        shape = ((m, window, tokens.shape[1]), "[m, K_s, K_t]")
        weights = check_tensor("plan", plan, dtype=FLOATING, shape=shape, device=device)
        check_constant("plan", weights, "it")
        lengths = window_lengths("student_lengths", student_lengths, (m, window), states.device)
        valid = torch.arange(window, device=states.device) < lengths.unsqueeze(-1)
        if checks_values(states):
            weights = weights.masked_fill(~valid.unsqueeze(-1), 0.0)
            check_targets("plan", weights, valid, normalize=True)
            check_ids_in_vocabulary("teacher_tokens", tokens, (weights != 0).any(1), vocabulary_of(head))
        lengths = lengths.clamp_min(1)  # windows of no token have a mean of 0
        hint = None if weights_hint is None else _row_hint(weights_hint, lengths, window)
    per_position = soft_target_kl(
        states,
        head,
        tokens.unsqueeze(1).expand(m, window, tokens.shape[1]),
        weights,
        normalize=True,
        temperature=temperature,
        mask=valid,
        weights_hint=hint if hint is not None else (valid / lengths.unsqueeze(-1)),
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return per_position.sum(-1) / lengths


def _row_hint(hint: object, lengths: Tensor, window: int) -> Tensor:
    """Return the weight of each window at each of its positions, [m, K_s]."""
    shape, device = (lengths.shape, "one for each window"), (lengths.device, "window_hidden")
    checked = check_tensor("weights_hint", hint, dtype=FLOATING, shape=shape, device=device)
    return (checked / lengths).unsqueeze(-1).expand(lengths.shape[0], window)
