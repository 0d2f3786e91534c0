"""Every op on the backend "triton" beside "reference" in float64 on the same inputs; what `bench.gpu_judge` decides on.

Everything runs on whatever device it is asked for: on a CPU, with TRITON_INTERPRET=1, in Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import topd
from bench.gpu_judge import Evidence, Part, no_worse
from bench.gpu_problems import (
    DIVERGENCES,
    OPTIONS,
    Options,
    Problem,
    Sizes,
    divergence,
    logprobs,
    make_problem,
    scores,
    transported,
)
from bench.gpu_repeats import again, variants
from bench.numerics import make_logits, our_rows, true_kl
from topd.ops.shared.engines import EAGER, TRITON
from topd.ops.transport.eager import transport as reference_transport
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import COSTS
from topd.ops.weighted_gather.op import weighted_gather
from topd.ops.weighted_scatter.op import weighted_scatter

NARROW = (torch.bfloat16, torch.float16)


def _compared(
    name: str, problem: Problem, dtype: torch.dtype, run: Callable[[str, torch.dtype], dict[str, Tensor]]
) -> Evidence:
    """triton in the dtype, eager torch in float32 on the same numbers, the reference in float64."""
    return Evidence(
        name, no_worse(run("triton", dtype), run("reference", torch.float32), run("reference", torch.float64), dtype)
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_divergences(sizes: Sizes, device: torch.device, *, quick: bool) -> Iterator[Evidence]:
    cases: list[tuple[str, Options, torch.dtype]] = [(name, {}, torch.float32) for name in DIVERGENCES]
    jsd = ("softcap", "hard weight")
    cases += [("jsd" if name in jsd else "reverse_kl", options, torch.float32) for name, options in OPTIONS.items()]
    cases += [(name, {}, dtype) for name in ("reverse_kl", "jsd") for dtype in NARROW]
    cases += [("reverse_kl", OPTIONS["everything"], torch.bfloat16)]
    named = {id(options): f", {name}" for name, options in OPTIONS.items()}
    if quick:
        cases = [case for i, case in enumerate(cases) if i < 3 or case[1] is OPTIONS["everything"] or case[2] != torch.float32]
    for number, (name, options, dtype) in enumerate(cases):
        problem = make_problem(sizes, device, options, dtype, number)
        label = f"linear_divergence {name} {_named(dtype)}{named.get(id(options), '')}"
        yield _compared(label, problem, dtype, partial(divergence, problem, DIVERGENCES[name]))


def check_logprobs(sizes: Sizes, device: torch.device, *, quick: bool) -> Iterator[Evidence]:
    many: Options = {"ids": sizes.ids}
    both: Options = {**many, "entropy": True, "repeats": True, "bias": True, "softcap": (6.0, None), "mask": True}
    cases: list[tuple[str, Options, torch.dtype]] = [
        ("M = 1", {"ids": 1}, torch.float32),
        (f"M = {sizes.ids}", many, torch.float32),
        ("repeats", {**many, "repeats": True}, torch.float32),
        ("entropy", {**many, "entropy": True}, torch.float32),
        ("entropy, repeats, bias, softcap, mask", both, torch.float32),
        *((f"M = {sizes.ids}, entropy", {**many, "entropy": True}, dtype) for dtype in NARROW),
    ]
    for number, (name, options, dtype) in enumerate(cases[-3:] if quick else cases):
        problem = make_problem(sizes, device, options, dtype, number)
        yield _compared(f"linear_logprobs {name} {_named(dtype)}", problem, dtype, partial(logprobs, problem))


def check_scores(sizes: Sizes, device: torch.device, *, quick: bool) -> Iterator[Evidence]:
    """The fused kernels; those of the row ops are checked with linear_divergence."""
    everything = ("everything", OPTIONS["everything"])
    cases = [("", {}, torch.float32), (*everything, torch.float32), (*everything, torch.bfloat16)]
    if not quick:
        names = ("larger teacher", "tokens of a larger tensor")
        cases += [(name, OPTIONS[name], dtype) for name, dtype in zip(names, NARROW, strict=True)]
    for number, (name, options, dtype) in enumerate(cases):
        problem = make_problem(sizes, device, options, dtype, number)
        label = f"score_tokens {_named(dtype)}{f', {name}' if name else ''}"
        yield _compared(label, problem, dtype, partial(scores, problem))


def check_near_equal(sizes: Sizes, device: torch.device) -> Iterator[Evidence]:
    """A KL of 1e-7 keeps its digits, row by row, where the usual formula has none left. The bound is ten times what the sum of
    p (expm1(-d) + d) is known to reach at 2.5e-8."""
    logits = make_logits(min(sizes.rows, 32), sizes.vocab, 1e-7, torch.Generator().manual_seed(0))
    student, teacher = (side.to(device) for side in logits)
    for name in ("reverse_kl", "forward_kl"):
        true = true_kl(student, teacher, name)
        found = our_rows(student, teacher, name, "triton").double() / true
        yield Evidence(f"{name} of 1e-7, relative", {"value": Part(found, torch.ones_like(true), 3e-4)})


def check_weighted(sizes: Sizes, device: torch.device) -> Iterator[Evidence]:
    """Gather and scatter beside the eager form in float64; the bound is over the sums of magnitudes."""
    generator = torch.Generator().manual_seed(0)
    rows, (width, _) = sizes.rows, sizes.widths
    ids = torch.randint(-1, sizes.vocab + 1, (rows, sizes.ids), generator=generator)
    ids[:, 0] = 3
    weights = torch.randn(rows, sizes.ids, generator=generator)
    table, states = (torch.randn(size, width, generator=generator) for size in (sizes.vocab, rows))
    most = {"gather": sizes.ids, "scatter": int(ids[(ids >= 0) & (ids < sizes.vocab)].bincount().max())}
    ids, weights = ids.to(device), weights.to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, op, out, source in (
            ("gather", weighted_gather, states, table),
            ("scatter", weighted_scatter, table, states),
        ):
            held, given = out.to(device), source.to(dtype).to(device)
            found, true, size = held.clone(), held.double(), held.double().abs()
            op(TRITON, found, given, ids, weights)
            op(EAGER, true, given.double(), ids, weights.double())
            op(EAGER, size, given.double().abs(), ids, weights.double().abs())
            bound = (most[name] + 2) * torch.finfo(torch.float32).eps
            relative = (found.double() - true) / size
            yield Evidence(f"weighted_{name} {_named(dtype)}", {"sums": Part(relative, torch.zeros_like(relative), bound, 1.0)})


def check_transport(sizes: Sizes, device: torch.device, *, quick: bool) -> Iterator[Evidence]:
    for window in sizes.windows[:1] if quick else sizes.windows:
        student, teacher = transported(sizes, device, window)
        double = [side._replace(table=side.table.double()) for side in (student, teacher)]
        tolerance = window[2]
        for cost in COSTS:
            distance, plan, error = run_transport(
                "triton", student, teacher, cost, 0.05, max_iterations=400, tolerance=tolerance
            )
            true, _, _ = reference_transport(double[0], double[1], cost, 0.05, max_iterations=400, tolerance=tolerance)
            rows, columns = (
                side.valid.double() / side.lengths.unsqueeze(-1) * side.lengths.max() for side in (student, teacher)
            )
            parts = {
                "distance": Part(distance, true, 10 * tolerance, max(float(true.abs().max()), 1e-3)),
                "row sums": Part(plan.double().sum(2) * student.lengths.max(), rows, 1e-5),
                "column sums": Part(plan.double().sum(1) * teacher.lengths.max(), columns, 1e-5),
                "marginal error": Part(error.clamp_min(0), torch.zeros_like(error), tolerance, 1.0),
            }
            yield Evidence(f"near_future_divergence {cost} {window[0]} x {window[1]}", parts)


def check_repeats(sizes: Sizes, device: torch.device) -> Iterator[Evidence]:
    """Two runs, bit for bit."""
    dtype = torch.bfloat16
    one = make_problem(sizes, device, OPTIONS["everything"], dtype, 2)
    many = make_problem(sizes, device, {"ids": sizes.ids, "repeats": True, "entropy": True}, dtype, 2)
    sides = transported(sizes, device, sizes.windows[0])

    def transports() -> dict[str, Tensor]:
        found = run_transport("triton", *sides, "cosine", 0.05, max_iterations=200, tolerance=1e-4)
        return dict(zip(("distance", "plan", "marginal error"), found, strict=True))

    yield again("linear_divergence", partial(divergence, one, topd.JSD(), "triton", dtype))
    yield again("linear_logprobs", partial(logprobs, many, "triton", dtype))
    yield again("score_tokens", partial(scores, one, "triton", dtype))
    yield again("near_future_divergence", transports)


def check_variants(sizes: Sizes, device: torch.device) -> Iterator[Evidence]:
    """Calls on ten numbers of rows make no more binaries than the first; the vocabulary's rows are aligned, as models' are."""
    sizes = replace(sizes, vocab=-(-sizes.vocab // 64) * 64)

    def runs(rows: int) -> None:
        one, many = (
            make_problem(sizes, device, {"rows": rows, "ids": ids, "scores": True, "entropy": True}, torch.bfloat16, 2)
            for ids in (1, sizes.ids)
        )
        divergence(one, topd.ReverseKL(), "triton", torch.bfloat16)
        divergence(one, topd.JSD(), "triton", torch.bfloat16)
        scores(one, "triton", torch.bfloat16)
        for problem in (one, many):
            logprobs(problem, "triton", torch.bfloat16)

    yield from variants(runs, sizes.counts)


def evidence(sizes: Sizes, device: torch.device, *, quick: bool = False) -> Iterator[Evidence]:
    """Every check, one after another."""
    yield from check_divergences(sizes, device, quick=quick)
    yield from check_logprobs(sizes, device, quick=quick)
    yield from check_scores(sizes, device, quick=quick)
    yield from check_near_equal(sizes, device)
    yield from check_weighted(sizes, device)
    yield from check_transport(sizes, device, quick=quick)
    yield from check_repeats(sizes, device)
    if device.type != "cpu":  # the interpreter compiles nothing
        yield from check_variants(sizes, device)
