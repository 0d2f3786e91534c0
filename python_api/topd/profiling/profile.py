"""`topd.profile`: what the steps inside a block spend, by stage, for a loop that a user or a trainer owns."""

from pathlib import Path

from topd.objectives.opd import OPD
from topd.objectives.topd import TOPD
from topd.profiling.block import Profile
from topd.profiling.recorder import another_profiler_runs


def profile(objective: OPD | TOPD, *, trace: str | Path | None = None) -> Profile:
    """Measure what the steps inside a block spend: time by stage, peak memory, the loss's share, and more::

        with topd.profile(objective) as profile:
            for batch in batches:
                loss = objective(batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(profile)

    A trainer's objective is measured the same way: `with topd.profile(trainer.objective) as profile: trainer.train()`.

    Every moment of the block belongs to one stage: the objective's own stages (forward of either model, divergence, windows,
    guidance), the parts of the backward pass, and the rest of the loop, which is the optimizer, the data and whatever else you
    do; `profile.stage(name)` gives a part of your loop a name. Only backward passes that begin at the objective's loss, or go
    through it, are parted. Run one step before the block, so that libraries are loaded and kernels compiled.

    On a GPU (CUDA, ROCm) times are of events on the stream of the student's device, read when the block ends: nothing waits for
    the GPU before. A stage's time is then what passes on the GPU from its beginning to its end, its waiting for the host too.
    Peak memory is torch's allocator's, whose statistics this resets; on a CPU it is the high-water mark of this process, which
    this resets too (Linux). The objective tells `topd.profile` what it does; no module and nothing of torch is patched.

    Args:
        objective: topd.OPD, TOPD, TRD or OPSD; its calls, by you or a trainer, are measured until the block ends, also by an
            error.
        trace: a file for torch.profiler's trace of the block in Chrome's format (chrome://tracing, ui.perfetto.dev). Recording
            slows a loop down, so take a few steps. None: no trace.

    Returns:
        Profile, to be entered once by `with`; after the block `print(profile)`, `profile.to_json(path)`, `profile.plot(path)`.

    Raises:
        TypeError: another kind of objective, or of trace.
        ValueError: when entered, where this objective is inside another such block, or the profile was used before; or where
            torch.profiler records already and a trace is asked for.

    Source: our choice.
    """
    if not isinstance(objective, OPD | TOPD):
        raise TypeError(
            f"objective must be a topd.OPD, TOPD, TRD or OPSD, got {type(objective).__name__}; of a trainer pass "
            "trainer.objective; in a loop that calls topd.linear_divergence take topd.OPD(student, teacher) in its place"
        )
    if trace is None:
        return Profile(objective, None)
    if not isinstance(trace, str | Path):
        raise TypeError(f"trace must be None or a path, got {type(trace).__name__}")
    if another_profiler_runs():
        raise ValueError("trace must be None while torch.profiler records already, which cannot run twice; leave it out")
    path = Path(trace)
    if not path.parent.is_dir():
        raise ValueError(f"trace must lie in a folder that exists, got {trace!s}; make {path.parent} first")
    return Profile(objective, path)
