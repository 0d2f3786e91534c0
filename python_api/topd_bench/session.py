"""A run of `topd bench`: its jobs one after the other, what they send, and a report that is whole whenever the run ends."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topd_bench.cpu.environment import child_environment
from topd_bench.plans import Options, requests_of
from topd_bench.records import FACTS, FAILED, NOW, ROWS, row_record
from topd_bench.report import machine_line, markdown_table, note, strict, write_json
from topd_bench.request import Request
from topd_bench.runner import Job, Record, Runner
from topd_bench.sweep import Growth, lines_of, slope_rows

WORKER = (sys.executable, "-m", "topd_bench.worker")
NO_END = 1e8  # seconds
FLOORS = ("floor", "warm_floor")
MOST_DECLARED = 6  # lines whose products are written out above a table; the file has all of them


class Session:
    """A run.

    Attributes:
        rows: the records of rows so far.
        facts: of the machine, from the first job.
        failed: whether topd was wrong, failed, or passed its budget.
        complete: whether every job came to its end.
    """

    def __init__(self, options: Options, path: Path | None, worker: Sequence[str] = WORKER) -> None:
        self.options, self.path, self.worker = options, path, worker
        self.rows: list[Record] = []
        self.facts: dict[str, Any] = {}
        self.failed, self.complete = False, False
        self.growth = None if options.sweep is None else Growth(options.sweep)
        self.runner = Runner(NO_END, self._hear)
        self.now, self.death = "", ""

    def run(self) -> int:
        """Measure, print, write; the exit status is 1 where topd failed, 130 after an interrupt."""
        requests = requests_of(self.options)
        self._write()
        for number, request in enumerate(requests, 1):
            note(f"job {number} of {len(requests)}: {request.place()}")
            self._run(request if self.growth is None else self.growth.reduced(request))
            if self.runner.signal is not None:
                break
        else:
            self.complete = True
        self._write()
        print(self.text(), flush=True)
        if self.runner.signal is not None:
            note("interrupted: what was measured until then is above" + (f" and in {self.path}" if self.path else ""))
            return 128 + self.runner.signal
        return int(self.failed)

    def _run(self, request: Request) -> None:
        """Run a job; where its process dies under a peer, once more without that peer."""
        while True:
            self.now = self.death = ""
            command = [*self.worker, request.text()]
            self.runner.run([Job(request.place(), command, 1.0, child_environment(request.malloc))])
            if not self.death or self.runner.signal is not None:
                return
            peer, why = self.now, f"the process {self.death}"
            self.failed = self.failed or peer in ("", "ours")
            if not peer or peer in request.skip:
                self._add(_died(request, why))
                return
            request = request.without(peer, why)

    def _hear(self, job: str, record: Record) -> None:
        """Take a line of a job."""
        if record["table"] == NOW:
            self.now = record["cells"][0]
        elif record["table"] == FACTS:
            self.facts = self.facts or {name: value for name, value in record["row"].items() if name != "malloc"}
        elif record["table"] == ROWS:
            self._add(record)
        elif record["cells"][1].startswith("died"):
            self.death = record["cells"][1]

    def _add(self, record: Record) -> None:
        """Keep a row, and write the report anew."""
        self.rows.append(record)
        self.failed = self.failed or bool(record["failed"])
        if self.growth is not None:
            self.growth.learn(record["row"])
        self._write()

    @property
    def fields(self) -> list[dict[str, Any]]:
        """Return the rows as the file has them."""
        return [record["row"] for record in self.rows]

    def slopes(self) -> tuple[list[str], list[list[str]]]:
        """Return the table of a sweep's slopes; empty where there is none."""
        axis, memory = self.options.sweep, self.options.case == "memory"
        lines = [] if axis is None else [line for line in lines_of(self.fields, axis) if len(line.sizes) > 1]
        return slope_rows(lines, str(axis), memory=memory) if lines else ([], [])

    def _write(self) -> None:
        if self.path is None:
            return
        header, rows = self.slopes()
        report = {
            "benchmark": self.options.case,
            "options": asdict(self.options),
            "complete": self.complete,
            "machine": self.facts,
            "rows": self.fields,
            "slopes": [dict(zip(header, row, strict=True)) for row in rows],
        }
        write_json(self.path, strict(report))

    def verdicts(self) -> list[str]:
        """Return a sentence a peer: how its time compares with topd's, over all rows."""
        ratios: dict[str, list[float]] = {}
        for row in self.fields:
            if "ours" in row.get("ratios", {}) and row["peer"] not in FLOORS:
                ratios.setdefault(row["peer"], []).append(row["ratios"]["ours"]["median"])
        return [
            f"{name} takes {min(each):.2f} to {max(each):.2f} times topd's time, in {len(each)} rows."
            if len(each) > 1
            else f"{name} takes {each[0]:.2f} times topd's time."
            for name, each in ratios.items()
        ]

    def text(self) -> str:
        """Return the tables, one for each heading, in Markdown."""
        parts = [machine_line(self.facts)] if self.facts else []
        headings = list(dict.fromkeys(record["heading"] for record in self.rows))
        for heading in headings:
            rows = [record for record in self.rows if record["heading"] == heading]
            table = markdown_table(rows[0]["header"], [record["cells"] for record in rows])
            parts.append(f"### {heading}{'' if self.complete else ' (incomplete)'}\n\n{_floor_line(rows)}{table}")
        header, slopes = self.slopes()
        if slopes:
            parts.append(f"### slopes over {self.options.sweep}\n\n{markdown_table(header, slopes)}")
        if verdicts := self.verdicts():
            parts.append("\n".join(verdicts))
        return "\n\n".join(parts) or "nothing was measured"


def _floor_line(rows: Sequence[Record]) -> str:
    """Return what the matrix products of the losses are; empty for cases that declare none."""
    declared = {}
    for row in (record["row"] for record in rows):
        if "gemm_flop" in row:
            place = f"N {row['shape']['n']:,}, {row['loss']}, {row['head']} head"
            declared[place] = f"{row['gemm_flop'] / 1e9:,.1f} Gflop, {row['least_bytes'] / 1e6:,.1f} MB"
    words = [f"{place} {size}" for place, size in declared.items()]
    if not words or len(words) > MOST_DECLARED:
        return ""
    return f"Matrix products, and the least that is read and written: {'; '.join(words)}.\n\n"


def _died(request: Request, why: str) -> Record:
    """Return the row of a job whose process died outside of any peer's call."""
    peers = ", ".join(request.peers or ())
    header = ("job", "peers", "note")
    row = {"job": request.place(), "peers": peers, "note": why, "status": FAILED}
    return row_record("jobs that died", header, [request.place(), peers, why], row, failed=True)
