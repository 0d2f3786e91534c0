"""The case `windows`: time and memory of windows by branching, beside `model.generate`.

One rollout of SmolLM2-135M, sampled by itself, and windows from random columns of it, greedy and without an end-of-sequence
token, so that everybody makes the same number of tokens. Contenders: topd's branching, its one pass over the rollout counted;
one `generate` call for each prefix; one `generate` call over all prefixes, left-padded. They take turns; a ratio is the median
of the rounds' own, with the smallest and the largest. Each has run on two short prefixes before. Peak memory is the high-water
mark of a contender's first call above what was resident, weights not counted. The last column counts windows that equal those
of one `generate` call per prefix token by token (rounding decides between logits that tie). Both models of a distillation are
measured: the teacher, 30 layers, and a student of 6 of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from topd_bench.timing import Sample, Spread, ratio, whole_rounds
from topd_demo import smollm2

HEADER = ("model", "way", "time_s", "time / branches", "peak_mib", "windows equal", "note")
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
    one_by_one = runs.get("generate, one prefix a call")
    reference = None if one_by_one is None else one_by_one.tokens
    rows = []
    for way, run in runs.items():
        assert run.tokens is not None
        equal = "-"
        if reference is not None:
            equal = f"{int((run.tokens == reference).all(-1).sum())} of {len(reference)}"
        against = str(ratio(samples[way], samples["branches"])) if "branches" in samples else "-"
        seconds = str(Spread.of([each.time_ms / 1e3 for each in samples[way]]))
        rows.append([name, way, seconds, against, f"{run.peak_mib:.0f}", equal])
    return rows


def work(request: Request) -> Iterator[Record]:
    """Yield the rows of both models."""
    count, horizon, tokens = (request.setting(name) for name in ("windows", "horizon", "tokens"))
    heading = f"windows: {count} of {horizon} tokens on a rollout of {tokens}, greedy, float32"
    if why := smollm2.missing():
        yield word_record(heading, HEADER, "SmolLM2-135M", why, failed=True)
        return
    teacher = smollm2.load_model()
    ids = rollout(teacher, tokens)
    generator = torch.Generator().manual_seed(1)
    columns = (torch.randperm(tokens - 1, generator=generator)[:count] + 1).sort().values
    for model in (teacher, smollm2.sliced(teacher)):
        label = f"{model.config.num_hidden_layers} layers"
        for warm_up in contenders(model, ids[:, :8], torch.tensor([3, 5]), 2).values():
            warm_up()
        ways = contenders(model, ids, columns, horizon)
        runs = {name: run for name, run in ways.items() if request.takes("ours" if name == "branches" else "generate")}

        def progress(text: str, label: str = label) -> None:
            note(f"windows, {label}: {text}")

        samples, complete = whole_rounds(runs, request.rounds, WallClock(), progress, warm_up=False)
        if all(samples.values()):
            counted = "" if complete else f"interrupted: {len(next(iter(samples.values())))} of {request.rounds} rounds"
            for cells in rows_of(label, runs, samples):
                yield plain_record(heading, HEADER, [*cells, counted])
        if not complete:
            raise KeyboardInterrupt
