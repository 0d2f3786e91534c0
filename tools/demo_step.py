"""What a step of the demo takes, by stage, and what bounds its windows: python -m tools.demo_step

OPD, TOPD as the demo runs it, and TOPD with cheaper windows take turns on the same rollouts: the demo's models, prompts and
counts, without the optimizer. Beside them every weight of each model is read once, by a sum, and every matrix is multiplied
once with one row for each rollout, which has one candidate: a step of all windows does the latter, and little else.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import topd
from topd.backends import choose_backend
from topd.cli.errors import INTERRUPTED
from topd.cli.options import positive
from topd_bench.cpu.clock import WallClock
from topd_bench.machine import cpu_facts
from topd_bench.report import machine_line, markdown_table, note
from topd_bench.step import STAGES, Rollouts, Step, median_seconds, with_rollouts
from topd_bench.timing import Contender, Sample, ratio, whole_rounds
from topd_demo import smollm2
from topd_demo.models import load
from topd_demo.plain import PlainMethod
from topd_demo.prompts import make_prompts
from topd_demo.settings import Settings

WINDOWS: dict[str, dict[str, Any]] = {
    "TOPD": {},
    "rollout": {"student_window": "rollout"},
    "counterfactual": {"student_window": "rollout", "window_noise": "counterfactual"},
    "K = 8": {"horizon": 8},
}


class Answers(Rollouts):
    """The student's answers to the prompts of one step of the demo after the other."""

    def __init__(self, method: PlainMethod) -> None:
        super().__init__(method.student, method.settings.batch, method.settings.tokens)
        self.method = method

    def __call__(self) -> None:
        torch.manual_seed(self.seed)
        self.batch, _ = self.method.batch(self.seed)
        self.seed += 1


def reading(model: torch.nn.Module) -> Callable[[], float]:
    """Return a function that reads every weight once."""
    return lambda: sum(float(each.detach().sum()) for each in model.parameters())


def multiplying(model: torch.nn.Module, rows: int) -> Callable[[], None]:
    """Return a function that multiplies every weight matrix once with so many rows."""
    matrices = [each.detach() for each in model.parameters() if each.dim() == 2]
    inputs = {width: torch.ones(rows, width) for width in {each.shape[1] for each in matrices}}

    def multiply() -> None:
        for each in matrices:
            torch.nn.functional.linear(inputs[each.shape[1]], each)

    return multiply


def mebibytes(model: torch.nn.Module) -> float:
    """Return the size of all weights, MiB."""
    return sum(each.numel() * each.element_size() for each in model.parameters()) / 2**20


def table(steps: Mapping[str, Step], samples: Mapping[str, Sequence[Sample]]) -> list[list[str]]:
    """Return the rows: medians of each stage over the timed rounds, then ratios to OPD, round by round."""
    rounds = len(samples["OPD"])
    rows = [[stage, *(median_seconds(each.stages[1 : 1 + rounds], stage) for each in steps.values())] for stage in STAGES]
    whole = [statistics.median(each.time_ms for each in samples[name]) / 1e3 for name in steps]
    rows.append(["step", *(f"{seconds:.2f}" for seconds in whole)])
    opd = with_rollouts(samples["OPD"], samples["rollouts"])
    ratios = [str(ratio(with_rollouts(samples[name], samples["rollouts"]), opd)) for name in steps if name != "OPD"]
    rows.append(["/ OPD, rollouts counted", "1", *ratios])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where the model is not installed."""
    options = argparse.ArgumentParser(prog="python -m tools.demo_step", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=positive, default=5, help="timed rounds (default 5)")
    rounds = options.parse_args(argv).rounds
    if smollm2.missing():
        note(f"tools.demo_step: {smollm2.missing()}")
        return 1
    settings = Settings(left_out=(4, 12, 13, 14, 15, 17))
    models = load(settings)
    prompts = make_prompts((rounds + 1) * settings.batch, settings.held_out, settings.seed)
    start = models.student.state_dict()
    rollouts = Answers(PlainMethod("opd", models, start, prompts, settings))
    steps = {"OPD": Step(topd.OPD(models.student, models.teacher), rollouts)}
    for name, changed in WINDOWS.items():
        config = topd.TOPDConfig(**{"horizon": settings.horizon, **changed})
        steps[name] = Step(topd.TOPD(models.student, models.teacher, config), rollouts)
    runs: dict[str, Contender] = {"rollouts": rollouts, **steps}
    readers = {"student": models.student, "teacher": models.teacher}
    for name, model in readers.items():
        runs |= {f"{name} read": reading(model), f"{name} multiplied": multiplying(model, settings.batch)}
    samples, _ = whole_rounds(runs, rounds, WallClock(), note)
    if not samples["OPD"]:
        return INTERRUPTED
    print(f"\n{machine_line(cpu_facts(choose_backend(None, torch.device('cpu'))))}, rounds {len(samples['OPD'])}\n")
    print(markdown_table(("stage", *(f"{name}, s" for name in steps)), table(steps, samples)))
    generation = statistics.median(each.time_ms for each in samples["rollouts"]) / 1e3
    print(f"\nrollouts of {settings.tokens} tokens: {generation:.2f} s")
    for name, model in readers.items():
        read, multiplied = (
            statistics.median(each.time_ms for each in samples[f"{name} {what}"]) for what in ("read", "multiplied")
        )
        size = f"{mebibytes(model):.0f} MiB of weights"
        print(f"{name}: {size}, read once in {read:.0f} ms, multiplied with {settings.batch} rows in {multiplied:.0f} ms")
    metrics = steps["TOPD"].stages[1:]
    for name in ("tokens", "candidates", "divergent_points"):
        print(f"{name}: {statistics.median(each[name] for each in metrics):.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
