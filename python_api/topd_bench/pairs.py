"""The case `pairs`: what a teacher's prompt of its own costs, in time and memory of a step on pairs, beside plain OPD.

Teacher SmolLM2-135M, student 6 of its layers with the shared embeddings and head, all trained, float32; reverse KL, value and
backward pass on the same response tokens (drawn at random: the work does not depend on them). Contenders take turns: OPD where
both read one prompt; the same as pairs; pairs whose teacher's prompt is longer; and the teacher's pass alone, behind either of
the prompts. The step with the longer prompt is compared with OPD's plus what the teacher's pass takes longer, round by round;
ratios are medians with the smallest and the largest. Peak memory is the high-water mark of a call above what was resident. It
differs from call to call by up to a tenth, so it is taken in rounds too.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import topd
from topd_bench.cpu.clock import WallClock
from topd_bench.cpu.high_water import high_water_mib, settle
from topd_bench.records import plain_record, word_record
from topd_bench.report import note
from topd_bench.request import Request
from topd_bench.runner import Record
from topd_bench.timing import Sample, Spread, ratio, times_ms, whole_rounds
from topd_demo import smollm2

HEADER = ("step", "time_ms", "time / expected", "peak_mib", "peak / OPD's", "note")
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


def peaks_mib(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return each contender's peaks, one a round; a call before counts for none, since the first one makes what stays."""
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in range(1, rounds + 1):
        note(f"pairs: memory, round {number}/{rounds}")
        for name, run in runs.items():
            baseline = settle()
            run()
            peaks[name].append(high_water_mib() - baseline)
    return peaks


def table(samples: dict[str, list[Sample]], peaks: dict[str, list[float]]) -> list[list[str]]:
    """Return a line for each contender; a step of pairs is compared with OPD's and what the teacher's pass takes longer, its
    peak with OPD's of the same round."""
    passes = zip(samples[OPD], samples[LONGER_PASS], samples[PASS], strict=True)
    expected = {
        EQUAL: samples[OPD],
        LONGER: [Sample(opd.time_ms + longer.time_ms - short.time_ms) for opd, longer, short in passes],
    }
    rows = []
    for name, times in samples.items():
        against = str(ratio(times, expected[name])) if name in expected else "-"
        shares = [mine / other for mine, other in zip(peaks[name], peaks[OPD], strict=True)]
        share = str(Spread.of(shares)) if name in STEPS[1:] else "-"
        rows.append([name, str(times_ms(times)), against, f"{statistics.median(peaks[name]):.0f}", share])
    return rows


def work(request: Request) -> Iterator[Record]:
    """Yield a row for every step and pass."""
    rows, prompt, longer, response = (request.setting(name) for name in ("rows", "prompt", "longer", "response"))
    heading = f"pairs: {rows} responses of {response} tokens, prompts of {prompt} and {longer}, float32"
    if why := smollm2.missing():
        yield word_record(heading, HEADER, "SmolLM2-135M", why, failed=True)
        return
    teacher = smollm2.load_model()
    runs = contenders(smollm2.sliced(teacher), teacher, rows, (prompt, longer, response))
    peaks = peaks_mib(runs, request.rounds)
    samples, complete = whole_rounds(runs, request.rounds, WallClock(), lambda text: note(f"pairs: {text}"), warm_up=False)
    if rounds := len(samples[OPD]):
        counted = "" if complete else f"interrupted: {rounds} of {request.rounds} rounds"
        for cells in table(samples, peaks):
            yield plain_record(heading, HEADER, [*cells, counted])
    if not complete:
        raise KeyboardInterrupt
