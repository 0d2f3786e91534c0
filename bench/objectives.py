"""TOPD's step beside OPD's on the same rollouts, by stage: `python -m bench.objectives`.

Teacher SmolLM2-135M, student 6 of its layers with the shared embeddings and head, all trained, float32. The student samples the
rollouts from short prompts, which is timed too. A step is the objective and its backward pass; both count one pass of the
teacher over the rollouts. TOPD's options are the method's: 2.25 % of the response tokens are candidates, 50 tokens a window,
guidance on the divergent ones. The two take turns; ratios are medians of the rounds' own, with the smallest and the largest.
The paper counts its 1.41 over training with the rollouts' generation: the last line counts ours so.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topd
from bench.measure import Spread, machine
from bench.process import INTERRUPTED, positive
from bench.report import machine_line, markdown_table, note, write_json
from topd.backends import choose_backend
from topd_demo import smollm2

HEADER = ("stage", "OPD, s", "TOPD, s")
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
Round = dict[str, float]


def sample_rollouts(student: Any, count: int, tokens: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """A batch of full rollouts, and the seconds that the student took for them."""
    torch.manual_seed(seed)
    prompts = torch.randint(1000, 20_000, (count, PROMPT))
    start = time.perf_counter()
    with torch.no_grad():
        ids = student.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens - PROMPT,
            do_sample=True,
            eos_token_id=NOWHERE,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - start
    response = torch.ones_like(ids)
    response[:, :PROMPT] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": response}, seconds


def timed_step(objective: topd.OPD | topd.TOPD, batch: Mapping[str, Tensor]) -> Round:
    """Seconds of each stage and of the step, and the metrics that say how much work it was."""
    objective.student.zero_grad(set_to_none=True)
    start = time.perf_counter()
    found = objective(batch, generator=torch.Generator().manual_seed(0))
    middle = time.perf_counter()
    found.loss.backward()
    end = time.perf_counter()
    seconds = {name.removeprefix("seconds_"): value.item() for name, value in found.metrics.items()}
    return seconds | {"backward": end - middle, "step": end - start}


def table(opd: Sequence[Round], both: Sequence[Round], generation: Sequence[float]) -> list[list[str]]:
    """Medians by stage; then ratios round by round."""

    def median(rounds: Sequence[Round], name: str) -> str:
        values = [each[name] for each in rounds if name in each]
        return f"{statistics.median(values):.2f}" if values else "-"

    rows = [[name, median(opd, name), median(both, name)] for name in (*STAGES, "step")]
    rows.append(["rollouts' generation", *[f"{statistics.median(generation):.2f}"] * 2])
    steps = list(zip(opd, both, generation, strict=True))
    rows.append(["TOPD / OPD, step", "1", str(Spread.of([b["step"] / a["step"] for a, b, _ in steps]))])
    with_generation = [(b["step"] + g) / (a["step"] + g) for a, b, g in steps]
    rows.append(["TOPD / OPD, rollouts counted", "1", str(Spread.of(with_generation))])
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench.objectives", description=(__doc__ or "").partition("\n")[0])
    for name, default, text in (
        ("rollouts", 2, "rollouts of a batch"),
        ("tokens", 512, "tokens of a rollout, prompt included"),
        ("horizon", 50, "tokens of a window"),
        ("rounds", 3, "timed rounds"),
    ):
        found.add_argument(f"--{name}", type=positive, default=default, help=f"{text} (default {default})")
    found.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write everything there")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where the model is not installed."""
    arguments = parser().parse_args(argv)
    if smollm2.missing():
        note(f"bench.objectives: {smollm2.missing()}")
        return 1
    described = machine(choose_backend(None, torch.device("cpu")), "default")
    teacher = smollm2.load_model()
    student = smollm2.sliced(teacher)
    opd, both = topd.OPD(student, teacher), topd.TOPD(student, teacher, topd.TOPDConfig(horizon=arguments.horizon))
    opd_rounds: list[Round] = []
    topd_rounds: list[Round] = []
    generation: list[float] = []
    try:
        for number in range(arguments.rounds + 1):
            note(f"round {number}/{arguments.rounds}" if number else "warm-up")
            batch, seconds = sample_rollouts(student, arguments.rollouts, arguments.tokens, seed=number)
            first, second = timed_step(opd, batch), timed_step(both, batch)
            if number:
                opd_rounds, topd_rounds, generation = [*opd_rounds, first], [*topd_rounds, second], [*generation, seconds]
    except KeyboardInterrupt:
        if not opd_rounds:
            return INTERRUPTED
    rows = table(opd_rounds, topd_rounds, generation)
    last = topd_rounds[-1]
    counts = ", ".join(f"{last[name]:.0f} {text}" for name, text in COUNTS.items())
    shape = f"{arguments.rollouts} rollouts of {arguments.tokens} tokens, K = {arguments.horizon}"
    print(f"\n### objectives, {shape}: {counts}\n\n{machine_line(described)}, rounds {len(opd_rounds)}\n")
    print(markdown_table(HEADER, rows), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "objectives", "machine": described, "header": HEADER, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
