"""What TOPD sees beyond a step's tokens: both models' windows at some positions, and the transport between them."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.branching.continuations import continue_from, from_rollout, given_rollout, noise_of
from topd.branching.prefill import Prefill
from topd.branching.replay import replay
from topd.branching.windows import Windows, both_windows
from topd.checks.rollouts import end_tokens
from topd.models.decoder import Decoder
from topd.models.output_layer import local
from topd.models.sampling import Sampling
from topd.models.split_embeddings import looked_up
from topd.near_future.transport import Transport, near_future_divergence
from topd.objectives.config import TOPDConfig
from topd.objectives.inputs import PaddedInputs
from topd.objectives.metrics import Stages
from topd.objectives.token_losses import TokenLosses
from topd.vocab_shard import is_dtensor


class Pass(NamedTuple):
    """Both models' pass over the rollouts, and what each response token costs."""

    inputs: PaddedInputs
    student: Decoder
    teacher: Decoder
    student_states: Prefill
    teacher_states: Prefill
    losses: TokenLosses


def draw_windows(
    tokens: Pass, positions: Tensor, config: TOPDConfig, generator: torch.Generator | None, stages: Stages
) -> Windows:
    """Let both models continue from the prefix before each position [m, 2]; the student draws first."""
    ends = end_tokens(config.eos_token_id, tokens.student.model, tokens.teacher.model)
    rollouts = tokens.inputs.rollouts
    ids, attended = rollouts.input_ids, rollouts.attended
    own, others = tokens.student.vocab, tokens.teacher.vocab
    table = _table(config.embedding, tokens.student, tokens.teacher)
    noise = noise_of(config.window_noise, ids, attended, positions, generator, tokens.student.output)

    def sampling(vocab: int) -> Sampling:
        return Sampling(config.horizon, config.window_temperature, generator, ends, vocab)

    with stages.stage("student_windows"):
        if config.student_window == "rollout":
            students = from_rollout(ids, attended, positions, config.horizon, rollouts.response)
            side = tokens.student, tokens.student_states
            noise = given_rollout(noise, *side, positions, students, config.window_temperature)
        else:
            drawn = sampling(own if table is None else min(own, table.shape[0]))
            students = continue_from(tokens.student, ids, attended, positions, drawn, prefix=tokens.student_states, noise=noise)
    with stages.stage("teacher_windows"):
        drawn = sampling(min(own, others))
        teachers = continue_from(tokens.teacher, ids, attended, positions, drawn, prefix=tokens.teacher_states, noise=noise)
    return both_windows(positions, students, teachers)


def lowest(score: Tensor, response: Tensor, positions: Tensor) -> Tensor:
    """Return the response tokens of the lowest score that are no candidates: in each trajectory as many as it has candidates,
    or all there are.

    Args:
        score: [B, T]; response: [B, T] bool.
        positions: [m, 2], the candidates.

    Returns:
        [r, 2] int64 (row, column), sorted.
    """
    row, column = positions.unbind(-1)
    others = response.index_put((row, column), torch.zeros_like(row, dtype=torch.bool))
    ranks = score.masked_fill(~others, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    counts = torch.bincount(row, minlength=score.shape[0])
    return (others & (ranks < counts.unsqueeze(-1))).nonzero()


def first(count: int, windows: Windows, transport: Transport) -> tuple[Windows, Transport]:
    """Return the first so many points of windows and of the transport between them."""
    tensors: dict[str, Any] = {name: value[:count] for name, value in vars(windows).items() if isinstance(value, Tensor)}
    parts = transport.distance[:count], transport.plan[:count], transport.marginal_error[:count]
    return replace(windows, **tensors), Transport(*parts)


@torch.no_grad()
def compare_windows(tokens: Pass, windows: Windows, config: TOPDConfig, stages: Stages) -> Transport:
    """Compare the two continuations at each position by optimal transport between their tokens."""
    options: dict[str, Any] = {"cost": config.cost, "solver": config.solver, "epsilon": config.epsilon}
    options |= {"student_lengths": windows.student_lengths, "teacher_lengths": windows.teacher_lengths}
    table: Any = _table(config.embedding, tokens.student, tokens.teacher)
    with stages.stage("transport"):
        if table is None:
            students = _states_of(tokens, windows.positions, windows.student_tokens, windows.student_lengths)
            teachers = _states_of(tokens, windows.positions, windows.teacher_tokens, windows.teacher_lengths)
            return near_future_divergence(student_vectors=students, teacher_vectors=teachers, **options)
        ids = windows.student_tokens, windows.teacher_tokens
        if not is_dtensor(table):
            return near_future_divergence(*ids, table.detach(), **options)
        if config.cost == "mismatch":  # which reads no row of the table
            return near_future_divergence(*ids, local(table.detach())[:0], **options)
        students, teachers = looked_up(table.detach(), tokens.student.output.shard, *ids)
        return near_future_divergence(student_vectors=students, teacher_vectors=teachers, **options)


def check_table(embedding: Tensor, common: int) -> None:
    """Check that a table [V, d] has a row for each token that both models have."""
    if embedding.shape[0] < common:
        raise ValueError(
            f"embedding must have a row for each of the {common:,} tokens that both models have, got {list(embedding.shape)}; "
            'give the rest a row, or take "student" or "teacher"'
        )


def _states_of(tokens: Pass, positions: Tensor, window: Tensor, lengths: Tensor) -> Tensor:
    """Return [m, K, H], the student's state on each token of a window [m, K]: the one that would predict the next."""
    longer = torch.cat([window, torch.zeros_like(window[:, :1])], dim=1)
    return replay(tokens.student, tokens.student_states.constant(), positions, longer, lengths + 1)[:, 1:]


def _table(embedding: str | Tensor, student: Decoder, teacher: Decoder) -> Tensor | None:
    """Return the embeddings that windows' tokens are looked up in; None where their states are compared."""
    if isinstance(embedding, Tensor):
        return embedding
    if embedding == "student_hidden":
        return None
    side = student if embedding == "student" else teacher
    weight: Tensor = side.model.get_input_embeddings().weight
    return weight
