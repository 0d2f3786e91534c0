"""The tables of `python -m bench.gpu`, and the same as JSON."""

from dataclasses import dataclass, field
from typing import Any

from bench.gpu import kernels, times, tune
from bench.gpu.kernels import KernelRow
from bench.gpu.times import TimeRow
from bench.gpu.tune import TuneRow
from bench.machine import Facts
from bench.report import markdown_table


def header_lines(facts: Facts) -> str:
    """Return one fact a line."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items() if value is not None)


@dataclass
class Report:
    """Everything measured so far; printed and written at the end, also of a run that broke off."""

    machine: Facts
    times: list[TimeRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    tuned: list[TuneRow] = field(default_factory=list)
    copy_gbs: float | None = None
    seconds: float = 0.0
    broken: str = ""

    @property
    def failed(self) -> list[TimeRow | KernelRow]:
        rows: list[TimeRow | KernelRow] = [*self.times, *self.kernels]
        return [row for row in rows if row.failed]

    def tables(self) -> str:
        """Return what was measured, as Markdown."""
        parts = []
        if self.times:
            parts += ["### times", "Medians (smallest-largest); ratios are of the same round. TFLOP/s: the floor's products."]
            parts.append(markdown_table(times.HEADER, [row.cells() for row in self.times]))
        if self.kernels:
            copied = "" if self.copy_gbs is None else f", a copy moves {self.copy_gbs:.0f} GB/s"
            parts += [f"### kernels{copied}", markdown_table(kernels.HEADER, [row.cells() for row in self.kernels])]
        if self.tuned:
            parts += ["### block sizes and warps", markdown_table(tune.HEADER, [row.cells() for row in self.tuned])]
        parts += [f"Wrong or failed, and not timed: {len(self.failed)}"] if self.failed else []
        parts += [f"Broke off: {self.broken}"] if self.broken else []
        return "\n\n".join([*parts, f"{self.seconds:.0f} s"])

    def json(self) -> dict[str, Any]:
        """Return the same for a file."""
        lists = {name: [row.row() for row in getattr(self, name)] for name in ("times", "kernels", "tuned")}
        facts = {"complete": not self.broken, "broken": self.broken, "seconds": self.seconds, "copy_gbs": self.copy_gbs}
        return {"benchmark": "gpu", "machine": self.machine, **facts, "failed": len(self.failed), **lists}
