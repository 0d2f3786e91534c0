"""The windows of a probe, each drawn once, and the arms: which two of them are compared.

    regenerate, independent    both models continue, each with noise of its own (TOPDConfig's default)
    regenerate, shared         both continue with the same Gumbel noise
    rollout, independent       the rollout's own next tokens, and a continuation of the teacher's
    rollout, counterfactual    the rollout's own next tokens, and what the teacher had said with the same luck
    teacher against itself     two continuations of the teacher's: what the sampling alone makes

What is drawn for an arm is what `topd.sample_windows` draws with the same generator; the teacher's windows of the last arm are
those of the first and the third. At high-loss tokens each arm is drawn once more, from other windows but for the rollout's: how
far the two distances agree says how much of a distance is the point's, and how much the draw's.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

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
# The same of each arm once more.
AGAIN = {
    BASE: ("student, shared", "teacher, again"),
    "regenerate, shared": ("student, shared again", "teacher, shared again"),
    "rollout, independent": (ROLLOUT, "teacher"),
    "rollout, counterfactual": (ROLLOUT, "teacher, counterfactual again"),
    SELF: ("teacher, shared", "teacher, shared again"),
}
DRAWS = 6  # seeds of a chunk


class Drawn(NamedTuple):
    """Windows by their name, and the seconds that each took beyond the pass over the rollouts; the rollout's take none."""

    windows: dict[str, Continuations]
    seconds: dict[str, float]


@torch.no_grad()
def draw(passes: Passes, positions: Tensor, again: int, settings: Settings, seed: int) -> Drawn:
    """Draw all windows [m, K] from positions [m, 2], and those whose names end in "again" after a noise's from the first
    `again` of them; the seed and the DRAWS - 1 that follow are for these alone."""
    ids, attended = passes.input_ids, passes.attended
    drawn = Drawn({ROLLOUT: from_rollout(ids, attended, positions, settings.horizon)}, {})
    generators = iter([torch.Generator().manual_seed(seed + place) for place in range(DRAWS)])

    def go_on(name: str, positions: Tensor, generator: torch.Generator, noise: Noise | None = None) -> None:
        """Let the model that the name begins with continue."""
        of_student = name.startswith("student")
        decoder = passes.student if of_student else passes.teacher
        states = passes.student_states if of_student else passes.teacher_states
        vocab = min(each.head.weight.shape[0] for each in (decoder, passes.student))
        sampling = Sampling(settings.horizon, settings.temperature, generator, passes.ends, vocab)
        start = time.perf_counter()
        drawn.windows[name] = continue_from(decoder, ids, attended, positions, sampling, prefix=states, noise=noise)
        drawn.seconds[name] = time.perf_counter() - start

    def share(suffix: str, positions: Tensor) -> None:
        generator = next(generators)
        noise = noise_of("shared", ids, attended, positions, generator)
        for model in ("student", "teacher"):
            go_on(f"{model}, shared{suffix}", positions, generator, noise)

    def follow(suffix: str, positions: Tensor) -> None:
        generator = next(generators)
        noise = noise_of("counterfactual", ids, attended, positions, generator)
        rollout = from_rollout(ids, attended, positions, settings.horizon)
        noise = given_rollout(noise, passes.student, passes.student_states, positions, rollout, settings.temperature)
        go_on(f"teacher, counterfactual{suffix}", positions, generator, noise)

    own = next(generators)
    for model in ("student", "teacher"):
        go_on(model, positions, own)
    share("", positions)
    go_on("teacher, again", positions, next(generators))
    follow("", positions)
    share(" again", positions[:again])
    follow(" again", positions[:again])
    return drawn
