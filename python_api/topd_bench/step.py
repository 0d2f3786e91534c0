"""The case `step`: TOPD's step beside OPD's on the same rollouts, by stage.

Teacher SmolLM2-135M, student 6 of its layers with the shared embeddings and head, all trained, float32. The student samples the
rollouts from short prompts, which is timed too. A step is the objective and its backward pass; both count one pass of the
teacher over the rollouts. TOPD's options are the method's: 2.25 % of the response tokens are candidates, 50 tokens a window,
guidance on the divergent ones. `--set horizon=10 rollout_windows=1` takes shorter windows, and the rollout itself in place of
windows that the student generates. The two take turns; ratios are medians of the rounds' own, with the smallest and the
largest. The paper counts its 1.41 over training with the rollouts' generation: the last line counts ours so.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import topd
from topd.options import StudentWindow
from topd_bench.cpu.clock import WallClock
from topd_bench.records import plain_record, word_record
from topd_bench.report import note
from topd_bench.request import Request
from topd_bench.runner import Record
from topd_bench.timing import Contender, Sample, ratio, times_ms, whole_rounds
from topd_demo import smollm2

HEADER = ("stage", "OPD, s", "TOPD, s", "note")
STAGES = (
    "student_forward",
    "teacher_forward",
    "divergence",
    "student_windows",
    "teacher_windows",
    "transport",
    "window_forward",
    "guidance",
    "backward",
)
COUNTS = {"tokens": "response tokens", "candidates": "candidates", "divergent_points": "divergent"}
PROMPT = 16
NOWHERE = 49152  # an end-of-sequence token that is never drawn
Stages = dict[str, float]


@dataclass
class Rollouts:
    """Full rollouts of the student; each call samples the next batch."""

    student: Any
    count: int
    tokens: int
    seed: int = 0
    batch: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self) -> None:
        torch.manual_seed(self.seed)
        self.seed += 1
        prompts = torch.randint(1000, 20_000, (self.count, PROMPT))
        with torch.no_grad():
            ids = self.student.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=self.tokens - PROMPT,
                do_sample=True,
                eos_token_id=NOWHERE,
                pad_token_id=0,
            )
        response = torch.ones_like(ids)
        response[:, :PROMPT] = 0
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": response}


@dataclass
class Step:
    """An objective and its backward pass on the rollouts of the round; keeps the seconds of each step's stages, and the metrics
    that say how much work it was."""

    objective: topd.OPD | topd.TOPD
    rollouts: Rollouts
    stages: list[Stages] = field(default_factory=list)

    def __call__(self) -> None:
        self.objective.student.zero_grad(set_to_none=True)
        result = self.objective(self.rollouts.batch, generator=torch.Generator().manual_seed(0))
        middle = time.perf_counter()
        result.loss.backward()
        backward = time.perf_counter() - middle
        metrics = {name.removeprefix("seconds_"): value.item() for name, value in result.metrics.items()}
        self.stages.append(metrics | {"backward": backward})


def median_seconds(rounds: Sequence[Stages], stage: str) -> str:
    """Return the median of a stage over the rounds that have it, as text."""
    values = [each[stage] for each in rounds if stage in each]
    return f"{statistics.median(values):.2f}" if values else "-"


def with_rollouts(steps: Sequence[Sample], rollouts: Sequence[Sample]) -> list[Sample]:
    """Return each step's time with that of its rollouts."""
    return [Sample(step.time_ms + rollout.time_ms) for step, rollout in zip(steps, rollouts, strict=True)]


def table(opd: Sequence[Stages], both: Sequence[Stages], samples: Mapping[str, Sequence[Sample]]) -> list[list[str]]:
    """Return medians by stage; then ratios round by round."""

    def seconds(name: str) -> str:
        return f"{times_ms(samples[name]).median / 1e3:.2f}"

    opd_counted, both_counted = (with_rollouts(samples[name], samples["rollouts"]) for name in ("OPD", "TOPD"))
    rows = [[name, median_seconds(opd, name), median_seconds(both, name)] for name in STAGES]
    rows.append(["step", seconds("OPD"), seconds("TOPD")])
    rows.append(["rollouts' generation", *[seconds("rollouts")] * 2])
    rows.append(["TOPD / OPD, step", "1", str(ratio(samples["TOPD"], samples["OPD"]))])
    rows.append(["TOPD / OPD, rollouts counted", "1", str(ratio(both_counted, opd_counted))])
    return rows


def work(request: Request) -> Iterator[Record]:
    """Yield a row for every stage."""
    count, tokens, horizon = (request.setting(name) for name in ("rollouts", "tokens", "horizon"))
    kind: StudentWindow = "rollout" if request.setting("rollout_windows") else "regenerate"
    heading = f"step: {count} rollouts of {tokens} tokens, K = {horizon}, student_window {kind}, float32"
    if why := smollm2.missing():
        yield word_record(heading, HEADER, "SmolLM2-135M", why, failed=True)
        return
    teacher = smollm2.load_model()
    student = smollm2.sliced(teacher)
    rollouts = Rollouts(student, count, tokens)
    opd = Step(topd.OPD(student, teacher), rollouts)
    both = Step(topd.TOPD(student, teacher, topd.TOPDConfig(horizon=horizon, student_window=kind)), rollouts)
    runs: dict[str, Contender] = {"rollouts": rollouts, "OPD": opd, "TOPD": both}
    samples, complete = whole_rounds(runs, request.rounds, WallClock(), lambda text: note(f"step: {text}"))
    if rounds := len(samples["OPD"]):
        counted = slice(1, 1 + rounds)  # without the warm-up, and what an interrupt broke off
        for cells in table(opd.stages[counted], both.stages[counted], samples):
            yield plain_record(heading, HEADER, [*cells, ""])
        for name, text in COUNTS.items():
            yield plain_record(heading, HEADER, [text, "-", f"{both.stages[rounds][name]:.0f}", "a count"])
    if not complete:
        raise KeyboardInterrupt
