"""Short continuations of one rollout from many of its prefixes: what TOPD compares, and the states it trains on.

    for each position (row, column t):  student and teacher each go on from input_ids[row, :t], t's own token included in what
    they replace; window_hidden[:, i] is the student's state that predicts window token i

Both models branch (`topd.branching`): one pass over the rollout fills a key-value cache, from which all windows grow together,
one token a step. Models are used in the mode that they are in: dropout that is on acts on windows too.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from topd.branching.continuations import BRANCHES, Continuations, continue_from, from_rollout, given_rollout, noise_of
from topd.branching.prefill import prefill
from topd.branching.replay import replay
from topd.checks.rollouts import (
    binary,
    check_differentiable,
    check_generator,
    check_ids,
    check_positions,
    check_rollouts,
    end_tokens,
)
from topd.checks.tokens import check_lengths
from topd.checks.values import check_tensor, choice, positive_int, real
from topd.models.context_parallel import refuse_context_parallel
from topd.models.decoder import decoder_of
from topd.models.properties import embedded_tokens
from topd.models.sampling import Sampling
from topd.options import StudentWindow, WindowNoise

STUDENT_WINDOWS: tuple[str, ...] = get_args(StudentWindow)
WINDOW_NOISES: tuple[str, ...] = get_args(WindowNoise)


@dataclass(frozen=True, eq=False)
class Windows:
    """Continuations of m prefixes by both models.

    Attributes:
        positions: [m, 2] int64 (row, column): the column of the window's first token.
        student_tokens, teacher_tokens: [m, K] int64, 0 past the lengths.
        student_lengths, teacher_lengths: [m] int64, 1 to K; an end-of-sequence token counts.
        student_way, teacher_way: where they come from: "branches", one forward a step over a shared cache; "generate: " and the
            reason, batches of left-padded prefixes; "rollout", taken from it.
    """

    positions: Tensor
    student_tokens: Tensor
    teacher_tokens: Tensor
    student_lengths: Tensor
    teacher_lengths: Tensor
    student_way: str = BRANCHES
    teacher_way: str = BRANCHES


def both_windows(positions: Tensor, student: Continuations, teacher: Continuations) -> Windows:
    """Return both models' continuations from the same positions as Windows."""
    return Windows(positions, student.tokens, teacher.tokens, student.lengths, teacher.lengths, student.way, teacher.way)


def check_window_noise(noise: object, student_window: str, temperature_name: str, temperature: float) -> None:
    """Check the name of a noise, and that it goes with the student's windows and their temperature."""
    choice("window_noise", noise, WINDOW_NOISES)
    if noise == "independent":
        return
    fits = "rollout" if noise == "counterfactual" else "regenerate"
    if student_window != fits:
        reason = (
            "is drawn given what the student said in the rollout"
            if noise == "counterfactual"
            else "is of windows that both models sample"
        )
        other = "shared" if noise == "counterfactual" else "counterfactual"
        raise ValueError(
            f'window_noise "{noise}" {reason}, got student_window="{student_window}"; take student_window="{fits}", or '
            f'window_noise="{other}"'
        )
    if temperature == 0:
        raise ValueError(
            f'window_noise "{noise}" needs {temperature_name} > 0, got {temperature!r}, which is greedy and has no noise; take '
            'window_noise="independent"'
        )


def sample_windows(
    student_model: Any,
    teacher_model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    *,
    horizon: int = 50,
    temperature: float = 1.0,
    student_window: StudentWindow = "regenerate",
    generator: torch.Generator | None = None,
    eos_token_id: int | list[int] | None = None,
    window_noise: WindowNoise = "independent",
    response_mask: Tensor | None = None,
) -> Windows:
    """Let student and teacher each continue from the prefix before every position.

    Args:
        student_model, teacher_model: causal language models of transformers, also inside PEFT. One that cannot branch is
            continued in batches of left-padded prefixes instead; the result says so and why. torch.compile goes around the base
            model or its layers: topd does not call the forward of the whole.
        input_ids: [B, T] int64, rollouts with their prompts, padded on either side. Both models have every token: checked on
            the CPU.
        attention_mask: [B, T] bool, or integers 0 and 1. position_ids are its cumsum - 1 and go on from there in a window.
        positions: [m, 2] int64 (row, column), as `select_candidates` returns them; a column and the one before it are attended:
            checked on the CPU.
        horizon: K > 0, tokens of a window.
        temperature: >= 0; 0 is greedy.
        student_window: "regenerate", the student continues too; "rollout", its window is the rollout's own next tokens, up
            to the last attended column, or with response_mask to where the response ends.
        generator: of the models' device; the same one in the same state gives the same windows. The student draws first.
        eos_token_id: an int or a list, at which every window that a model samples ends; None: those of both models'
            generation_configs, whichever of the two says them. [] for none.
        window_noise: "independent": each model draws for itself. The others keep each model's distribution exactly, and need a
            temperature > 0. "shared", with "regenerate": both draw argmax(log p + g) with the same Gumbel noise g. Its seed is
            one number of the generator's; g depends on that, on the point (what its row says, and its place in it), the step
            and the token, and not on the batch. "counterfactual", with "rollout": g is drawn given that the student chose the
            rollout's tokens, so that the teacher says what it would have said with the same luck. This wants rollouts that
            were sampled at `temperature` from all tokens that both models have. A teacher that equals the student repeats the
            rollout; where that stops without an end-of-sequence token, so does the teacher's window.
        response_mask: [B, T] bool, or integers 0 and 1, True at the tokens that the student sampled, every position among them
            (checked on the CPU). A window of the rollout then ends before a tool's output and before the next turn. None: every
            attended token may stand in one.

    Returns:
        Windows. A teacher with more tokens than the student draws from those that both have.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option; a position that is not attended, or no
            response token; a token that one of the models does not have.

    Source: arXiv 2606.00305: windows of 50 tokens of both models from one prefix of the student's. Decoding is our choice. The
    noise given the rollout: Maddison et al. 2014, "A* Sampling" (truncated Gumbels); Oberst and Sontag 2019, arXiv 1905.05824;
    its use here is ours, as is "shared".
    """
    refuse_split_rollouts()
    ids, attended = check_rollouts(input_ids, attention_mask)
    response = None if response_mask is None else binary("response_mask", response_mask, ids, "input_ids")
    positions = check_positions(positions, attended, response)
    positive_int("horizon", horizon)
    real("temperature", temperature, low=0.0)
    choice("student_window", student_window, STUDENT_WINDOWS)
    check_window_noise(window_noise, student_window, "temperature", temperature)
    check_generator(generator, ids.device)
    student, teacher = decoder_of(student_model), decoder_of(teacher_model)
    check_ids("input_ids", ids, student=embedded_tokens(student_model), teacher=embedded_tokens(teacher_model))
    ends, own = end_tokens(eos_token_id, student.model, teacher.model), student.vocab
    noise = noise_of(window_noise, ids, attended, positions, generator, student.output)
    if student_window == "rollout":
        students = from_rollout(ids, attended, positions, horizon, response)
        if noise is not None:
            with torch.no_grad():
                states = prefill(student, ids, attended, cache=False)
            noise = given_rollout(noise, student, states, positions, students, temperature)
    else:
        drawn = Sampling(horizon, temperature, generator, ends, own)
        students = continue_from(student, ids, attended, positions, drawn, noise=noise)
    drawn = Sampling(horizon, temperature, generator, ends, min(own, teacher.vocab))
    teachers = continue_from(teacher, ids, attended, positions, drawn, noise=noise)
    return both_windows(positions, students, teachers)


def window_hidden(student_model: Any, input_ids: Tensor, attention_mask: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return the student's states over rollouts and all their windows, with gradient.

    One pass over the rollouts, whose key-value cache the windows' tokens attend to, all windows of a group in one forward.
    Where a cache is forbidden (gradient checkpointing) a group is one forward together with its rollouts; a model that cannot
    branch goes over every prefix again.

    Args:
        student_model: as in `sample_windows`.
        input_ids, attention_mask: [B, T], as in `sample_windows`.
        windows: positions, student_tokens and student_lengths are read.

    Returns:
        rollout_hidden [B, T, H], the state at each column, after the final norm, and window_hidden [m, K, H] in its dtype;
        [:, i] predicts window token i, so that [:, 0] is the state of the last prefix token; 0 past a window's length.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or range; a token that the student does not have.
    """
    refuse_split_rollouts()
    ids, attended = check_rollouts(input_ids, attention_mask)
    if not isinstance(windows, Windows):
        raise TypeError(f"windows must be a topd.Windows, got {type(windows).__name__}; sample_windows returns one")
    positions = check_positions(windows.positions, attended)
    tokens, lengths = _check_side(windows, ids)
    decoder = decoder_of(student_model)
    check_differentiable("student_model", decoder.model)
    check_ids("input_ids", ids, student=embedded_tokens(student_model))
    counted = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1)
    check_ids("windows.student_tokens", tokens.masked_fill(~counted, 0), student=embedded_tokens(student_model))
    prefix = prefill(decoder, ids, attended, cache=decoder.keeps_cache)
    return prefix.hidden, replay(decoder, prefix, positions, tokens, lengths)


def refuse_split_rollouts() -> None:
    """Refuse windows where each process has a part of each rollout."""
    refuse_context_parallel(
        "TOPD's windows",
        "branch off whole rollouts, whose keys and values they grow from",
        "leave the block, or take topd.OPD, which has no windows",
    )


def _check_side(windows: Windows, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    device = (input_ids.device, "input_ids")
    tokens = check_tensor("windows.student_tokens", windows.student_tokens, dtype=torch.int64, device=device)
    m = check_tensor("windows.positions", windows.positions).shape[0]
    if tokens.dim() != 2 or tokens.shape[0] != m or not tokens.shape[1]:
        raise ValueError(f"windows.student_tokens must be [{m}, K], a row for each position, got {list(tokens.shape)}")
    shape = ((m,), "one for each position")
    name, lengths = "windows.student_lengths", windows.student_lengths
    return tokens, check_lengths(name, lengths, tokens.shape[1], shape=shape, device=device)
