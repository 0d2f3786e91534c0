"""What a teacher's prompt of its own costs: time and memory of a step on pairs, beside plain OPD: `python -m topd_bench.pairs`.

Teacher SmolLM2-135M, student 6 of its layers with the shared embeddings and head, all trained, float32; reverse KL, value and
backward pass on the same response tokens (drawn at random: the work does not depend on them). Contenders take turns: OPD where
both read one prompt; the same as pairs; pairs whose teacher's prompt is longer; and the teacher's pass alone, behind either of
the prompts. The step with the longer prompt is compared with OPD's plus what the teacher's pass takes longer, round by round;
ratios are medians with the smallest and the largest. Peak memory is the high-water mark of a second call above what was
resident.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
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
from topd_bench.timing import Sample, ratio, times_ms, whole_rounds
from topd_demo import smollm2

HEADER = ("step", "time_ms", "time / expected", "peak_mib", "peak / OPD's")
OPD, EQUAL, LONGER = "OPD", "pairs, one prompt", "pairs, a longer prompt for the teacher"
PASS, LONGER_PASS = "the teacher's pass", "the teacher's pass, longer prompt"
STEPS = (OPD, EQUAL, LONGER)


def pairs_of(rows: int, prompt: int, teacher_prompt: int, response: int) -> dict[str, Tensor]:
    """Return pairs of random tokens: prompts and responses of one length each."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randint(1000, 20_000, (rows, length), generator=generator).tolist() for length in (prompt, response)]
    longer = torch.randint(1000, 20_000, (rows, teacher_prompt - prompt), generator=generator).tolist()
    teacher_prompts = [more + own for more, own in zip(longer, sides[0], strict=True)]
    return topd.pair(sides[0], teacher_prompts, sides[1], 0)


def step(objective: topd.OPD, batch: dict[str, Tensor]) -> None:
    """Take the loss and its gradients."""
    objective.student.zero_grad(set_to_none=True)
    objective(batch).loss.backward()


@torch.no_grad()
def teacher_pass(teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the teacher's states of its side of the pairs."""
    hidden, _ = topd.hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_attention_mask"])
    return hidden


def contenders(student: Any, teacher: Any, rows: int, lengths: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; `lengths`: of the prompt, the teacher's longer prompt and the response."""
    prompt, teacher_prompt, response = lengths
    equal, longer = (pairs_of(rows, prompt, each, response) for each in (prompt, teacher_prompt))
    plain = {name: value for name, value in equal.items() if not name.startswith("teacher_")}
    objective = topd.OPD(student, teacher)
    steps = {name: partial(step, objective, batch) for name, batch in zip(STEPS, (plain, equal, longer), strict=True)}
    return {**steps, PASS: partial(teacher_pass, teacher, equal), LONGER_PASS: partial(teacher_pass, teacher, longer)}


def peaks_mib(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return each contender's peak memory; the second call counts, since the first one of a process makes what stays."""
    peaks = {}
    for name, run in runs.items():
        run()
        baseline = settle()
        run()
        peaks[name] = high_water_mib() - baseline
    return peaks


def table(samples: dict[str, list[Sample]], peaks: dict[str, float]) -> list[list[str]]:
    """Return a line for each contender; a step of pairs is compared with OPD's and what the teacher's pass takes longer."""
    passes = zip(samples[OPD], samples[LONGER_PASS], samples[PASS], strict=True)
    expected = {
        EQUAL: samples[OPD],
        LONGER: [Sample(opd.time_ms + longer.time_ms - short.time_ms) for opd, longer, short in passes],
    }
    rows = []
    for name, times in samples.items():
        against = str(ratio(times, expected[name])) if name in expected else "-"
        share = f"{peaks[name] / peaks[OPD]:.2f}" if name in STEPS else "-"
        rows.append([name, str(times_ms(times)), against, f"{peaks[name]:.0f}", share])
    return rows


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    counts = {
        "rows": (2, "responses"),
        "prompt": (16, "tokens of the prompt"),
        "longer": (256, "tokens of the teacher's longer prompt"),
        "response": (256, "tokens of a response"),
        "rounds": (7, "timed rounds"),
    }
    return parser_of("pairs", __doc__, counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where the model is not installed."""
    arguments = parser().parse_args(argv)
    if smollm2.missing():
        note(f"topd_bench.pairs: {smollm2.missing()}")
        return 1
    if arguments.longer < arguments.prompt:
        parser().error(f"--longer must be at least --prompt, got {arguments.longer} and {arguments.prompt}")
    facts = cpu_facts(choose_backend(None, torch.device("cpu")))
    teacher = smollm2.load_model()
    lengths = (arguments.prompt, arguments.longer, arguments.response)
    runs = contenders(smollm2.sliced(teacher), teacher, arguments.rows, lengths)
    try:
        peaks = peaks_mib(runs)
    except KeyboardInterrupt:
        return INTERRUPTED
    samples, complete = whole_rounds(runs, arguments.rounds, WallClock(), note, warm_up=False)
    if not samples[OPD]:
        return INTERRUPTED
    rows = table(samples, peaks)
    shape = f"{arguments.rows} responses of {arguments.response} tokens, prompts of {arguments.prompt} and {arguments.longer}"
    print(f"\n### pairs, {shape}, float32{'' if complete else ' (incomplete)'}\n\n{machine_line(facts)}\n")
    print(markdown_table(HEADER, rows), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "pairs", "machine": facts, "header": HEADER, "rows": rows})
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
