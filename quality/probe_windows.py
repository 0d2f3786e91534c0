"""The windows of a probe, each drawn once, and the arms: which two of them are compared.

    regenerate, independent    both models continue, each with noise of its own (TOPDConfig's default)
    regenerate, shared         both continue with the same Gumbel noise
    rollout, independent       the rollout's own next tokens, and a continuation of the teacher's
    rollout, counterfactual    the rollout's own next tokens, and what the teacher had said with the same luck
    teacher against itself     two continuations of the teacher's: what the sampling alone makes

What is drawn for an arm is what `topd.sample_windows` draws with the same generator; the teacher's windows of the last arm are
those of the first and the third.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

import topd
from quality.probe_points import Passes, Settings
from topd.branching.continuations import Continuations, continue_from, from_rollout, given_rollout, noise_of
from topd.branching.noise import Noise
from topd.models.sampling import Sampling

ROLLOUT = "rollout"
SELF = "teacher against itself"
BASE = "regenerate, independent"
# An arm, and the names of its student's and its teacher's windows.
ARMS = {
    BASE: ("student", "teacher"),
    "regenerate, shared": ("student, shared", "teacher, shared"),
    "rollout, independent": (ROLLOUT, "teacher, again"),
    "rollout, counterfactual": (ROLLOUT, "teacher, counterfactual"),
    SELF: ("teacher, again", "teacher"),
}
DRAWS = 4  # seeds of a chunk


class Drawn(NamedTuple):
    """Windows by their name, and the seconds that each took beyond the pass over the rollouts; the rollout's take none."""

    windows: dict[str, Continuations]
    seconds: dict[str, float]


@torch.no_grad()
def draw(passes: Passes, positions: Tensor, settings: Settings, seed: int) -> Drawn:
    """Draw all windows [m, K] from positions [m, 2]; the seed and the DRAWS - 1 that follow are for these alone."""
    ids, attended = passes.input_ids, passes.attended
    rollout = from_rollout(ids, attended, positions, settings.horizon)
    drawn = Drawn({ROLLOUT: rollout}, {})

    def go_on(name: str, generator: torch.Generator, noise: Noise | None = None) -> None:
        """Let the model that the name begins with continue."""
        of_student = name.startswith("student")
        decoder = passes.student if of_student else passes.teacher
        states = passes.student_states if of_student else passes.teacher_states
        vocab = min(each.head.weight.shape[0] for each in (decoder, passes.student))
        sampling = Sampling(settings.horizon, settings.temperature, generator, passes.ends, vocab)
        start = time.perf_counter()
        drawn.windows[name] = continue_from(decoder, ids, attended, positions, sampling, prefix=states, noise=noise)
        drawn.seconds[name] = time.perf_counter() - start

    own, shared, again, counterfactual = (torch.Generator().manual_seed(seed + place) for place in range(DRAWS))
    for name in ("student", "teacher"):
        go_on(name, own)
    noise = noise_of("shared", ids, attended, positions, shared)
    for name in ("student, shared", "teacher, shared"):
        go_on(name, shared, noise)
    go_on("teacher, again", again)
    noise = noise_of("counterfactual", ids, attended, positions, counterfactual)
    noise = given_rollout(noise, passes.student, passes.student_states, positions, rollout, settings.temperature)
    go_on("teacher, counterfactual", counterfactual, noise)
    return drawn


def distances(drawn: Drawn, embedding: Tensor, horizons: tuple[int, ...]) -> dict[str, list[list[float]]]:
    """Return each arm's near-future distances: for each point one at each horizon, of the windows' first so many tokens.

    They are those of TOPDConfig's defaults: cosine cost between the student's input embeddings [V, d], Sinkhorn. Windows that
    are equal token by token are at distance 0, where the entropy of the plan would leave up to a few thousandths.
    """
    values = {}
    for arm, names in ARMS.items():
        student, teacher = (drawn.windows[name] for name in names)
        columns = [_distance(student, teacher, embedding, horizon) for horizon in horizons]
        values[arm] = torch.stack(columns, dim=-1).tolist()
    return values


def _distance(student: Continuations, teacher: Continuations, embedding: Tensor, horizon: int) -> Tensor:
    """Return the distance [m] of the windows' first tokens."""
    ours, others = (side.tokens[:, :horizon].contiguous() for side in (student, teacher))
    lengths, other_lengths = (side.lengths.clamp_max(horizon) for side in (student, teacher))
    transport = topd.near_future_divergence(
        ours, others, embedding.detach(), student_lengths=lengths, teacher_lengths=other_lengths
    )
    equal = (ours == others).all(-1) & (lengths == other_lengths)  # tokens are 0 past the lengths
    return transport.distance.masked_fill(equal, 0.0)
