"""The case `transport`: time of Sinkhorn over many window pairs, beside POT.

m pairs of K x K tokens, embeddings [V, d], cosine cost, plans at epsilon and tolerance as asked (peers/transport.py has the
contenders, and what each means by the tolerance). Contenders take turns, after an untimed round.
"""

from collections.abc import Iterator

from topd_bench.cpu.clock import WallClock
from topd_bench.limits import Guarded, first_call, limit_memory
from topd_bench.peers.peer import not_installed
from topd_bench.peers.transport import contenders, make_pairs
from topd_bench.records import now_record, plain_record, word_record
from topd_bench.report import note, scientific
from topd_bench.request import Request
from topd_bench.runner import Record
from topd_bench.timing import ratio, times_ms, whole_rounds

HEADER = ("peer", "time_ms", "time / topd", "largest row error, K x", "mean distance", "note")


def work(request: Request) -> Iterator[Record]:
    """Yield a row for every solver."""
    m, window, width = (request.setting(name) for name in ("windows", "window", "width"))
    epsilon, tolerance = request.settings["epsilon"], request.settings["tolerance"]
    heading = f"transport: {m} pairs of {window} x {window}, d {width}, cosine, epsilon {epsilon:g}, tolerance {tolerance:g}"
    pairs = make_pairs(m, window, width)
    every = contenders(pairs, epsilon, tolerance)
    limit_gib = limit_memory(request.limit_gib)
    runs, solutions = {}, {}
    for name, run in every.items():
        if not request.takes("ours" if name == "topd" else "pot"):
            continue
        yield now_record(name)
        note(f"transport: {name}")
        call = first_call(run, limit_gib)
        if call.why:
            yield word_record(heading, HEADER, name, call.why, failed=name == "topd")
        else:
            runs[name], solutions[name] = Guarded(run, limit_gib), call.result
    if len(every) == 1 and request.takes("pot"):
        yield word_record(heading, HEADER, "pot", not_installed("ot", "POT"))
    samples, complete = whole_rounds(runs, request.rounds, WallClock(), lambda text: note(f"transport: {text}"))
    for name, taken in samples.items():
        if runs[name].why or not taken:
            why = runs[name].why or "interrupted before a whole round"
            yield word_record(heading, HEADER, name, why, failed=name == "topd")
            continue
        against = str(ratio(taken, samples["topd"])) if "topd" in samples else "-"
        error, distance = scientific(solutions[name].row_error), float(solutions[name].distance.mean())
        counted = "" if complete else f"interrupted: {len(taken)} of {request.rounds} rounds"
        yield plain_record(heading, HEADER, [name, str(times_ms(taken)), against, error, f"{distance:.5f}", counted])
    if not complete:
        raise KeyboardInterrupt
