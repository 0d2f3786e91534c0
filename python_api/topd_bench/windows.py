"""Time and memory of windows by branching, beside `model.generate`: `python -m topd_bench.windows`.

One rollout of SmolLM2-135M, sampled by itself, and windows from random columns of it, greedy and without an end-of-sequence
token, so that everybody makes the same number of tokens. Contenders: topd's branching, its one pass over the rollout counted;
one `generate` call for each prefix; one `generate` call over all prefixes, left-padded. They take turns; a ratio is the median
of the rounds' own, with the smallest and the largest. Each has run on two short prefixes before. Peak memory is the high-water
mark of a contender's first call above what was resident, weights not counted. The last column counts windows that equal those
of one `generate` call per prefix token by token (rounding decides between logits that tie). Both models of a distillation are
measured: the teacher, 30 layers, and a student of 6 of them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import topd
from topd.backends import choose_backend
from topd_bench.command import INTERRUPTED, parser_of
from topd_bench.cpu.clock import WallClock
from topd_bench.cpu.high_water import high_water_mib, settle
from topd_bench.machine import cpu_facts
from topd_bench.report import machine_line, markdown_table, note, write_json
from topd_bench.timing import Sample, Spread, ratio, whole_rounds
from topd_demo import smollm2

HEADER = ("model", "way", "time_s", "time / branches", "peak_mib", "windows equal")
NOWHERE = 49152  # an end-of-sequence token that is never drawn


@dataclass
class Watched:
    """A contender that keeps its first call's peak memory, and its result."""

    run: Callable[[], Tensor]
    peak_mib: float = 0.0
    tokens: Tensor | None = field(default=None, repr=False)

    def __call__(self) -> Tensor:
        if self.tokens is not None:
            return self.run()
        baseline = settle()
        self.tokens = self.run()
        self.peak_mib = high_water_mib() - baseline
        return self.tokens


def rollout(model: Any, length: int, seed: int = 0) -> Tensor:
    """Let the model sample [1, length] from its first token on."""
    torch.manual_seed(seed)
    first = torch.tensor([[1]])
    ids: Tensor = model.generate(first, max_new_tokens=length - 1, do_sample=True, eos_token_id=NOWHERE, pad_token_id=0)
    return ids


def contenders(model: Any, ids: Tensor, columns: Tensor, horizon: int) -> dict[str, Watched]:
    """Return the ways to make windows [m, horizon] of the model, by name."""
    attended = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.stack([torch.zeros_like(columns), columns], dim=1)
    settings = {"max_new_tokens": horizon, "do_sample": False, "eos_token_id": NOWHERE, "pad_token_id": 0}

    def branches() -> Tensor:
        options: dict[str, Any] = {"horizon": horizon, "temperature": 0.0, "eos_token_id": NOWHERE}
        # The model stands in the teacher's place; the student's windows are the rollout's own next tokens, which cost nothing.
        windows = topd.sample_windows(model, model, ids, attended, positions, student_window="rollout", **options)
        if windows.teacher_way != "branches":
            raise RuntimeError(f"the model did not branch: {windows.teacher_way}")
        return windows.teacher_tokens

    def one_by_one() -> Tensor:
        prefixes = [ids[:, :column] for column in columns.tolist()]
        return torch.cat([model.generate(p, attention_mask=torch.ones_like(p), **settings)[:, p.shape[1] :] for p in prefixes])

    def batched() -> Tensor:
        width = int(columns.max())
        place = torch.arange(width) - (width - columns).unsqueeze(1)
        mask = place >= 0
        padded = torch.where(mask, ids[0, place.clamp_min(0)], 0)
        tokens: Tensor = model.generate(padded, attention_mask=mask.long(), **settings)
        return tokens[:, width:]

    runs = {"branches": branches, "generate, one prefix a call": one_by_one, "generate, one batch": batched}
    return {name: Watched(torch.no_grad()(run)) for name, run in runs.items()}


def rows_of(name: str, runs: dict[str, Watched], samples: dict[str, list[Sample]]) -> list[list[str]]:
    """Return the lines of one model."""
    reference = runs["generate, one prefix a call"].tokens
    rows = []
    for way, run in runs.items():
        assert run.tokens is not None
        assert reference is not None
        equal = int((run.tokens == reference).all(-1).sum())
        against = "1" if way == "branches" else str(ratio(samples[way], samples["branches"]))
        seconds = str(Spread.of([each.time_ms / 1e3 for each in samples[way]]))
        rows.append([name, way, seconds, against, f"{run.peak_mib:.0f}", f"{equal} of {len(reference)}"])
    return rows


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    counts = {
        "windows": (32, "windows"),
        "horizon": (50, "tokens of a window"),
        "tokens": (512, "tokens of the rollout"),
        "rounds": (3, "timed rounds"),
    }
    parser = parser_of("windows", __doc__, counts)
    parser.add_argument("--model", nargs="+", choices=("teacher", "student"), default=["teacher", "student"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where the model is not installed."""
    arguments = parser().parse_args(argv)
    if smollm2.missing():
        note(f"topd_bench.windows: {smollm2.missing()}")
        return 1
    facts = cpu_facts(choose_backend(None, torch.device("cpu")))
    teacher = smollm2.load_model()
    ids = rollout(teacher, arguments.tokens)
    generator = torch.Generator().manual_seed(1)
    columns = (torch.randperm(arguments.tokens - 1, generator=generator)[: arguments.windows] + 1).sort().values
    rows: list[list[str]] = []
    complete = True
    for name in arguments.model:
        model = teacher if name == "teacher" else smollm2.sliced(teacher)
        label = f"{name}, {model.config.num_hidden_layers} layers"
        for warm_up in contenders(model, ids[:, :8], torch.tensor([3, 5]), 2).values():
            warm_up()
        runs = contenders(model, ids, columns, arguments.horizon)

        def progress(text: str, label: str = label) -> None:
            note(f"{label}: {text}")

        samples, complete = whole_rounds(runs, arguments.rounds, WallClock(), progress, warm_up=False)
        if samples["branches"]:
            rows += rows_of(label, runs, samples)
        if not complete:
            break
    shape = f"{arguments.windows} windows of {arguments.horizon} tokens on a rollout of {arguments.tokens}"
    print(f"\n### windows, {shape}, greedy, float32{'' if complete else ' (incomplete)'}\n\n{machine_line(facts)}\n")
    print(markdown_table(HEADER, rows), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "windows", "machine": facts, "header": HEADER, "rows": rows})
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
