"""`python -m bench.gpu --tune`: each kernel with other block sizes and warps than its launcher's. Nothing is changed by it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.cases import Case
from bench.gpu_clock import Clock, spread_ms
from bench.gpu_kernels import Op, label, score_ops
from bench.measure import Spread

HEADER = ("op", "kernel", "default", "time_ms", "best", "time_ms", "default / best", "tried")
BLOCKS, WARPS = (512, 1024, 2048, 4096), (2, 4, 8)
SCORE_TILES = ((64, 64, 32, 4), (64, 128, 64, 4), (128, 64, 32, 8), (128, 64, 64, 4), (128, 64, 64, 8), (128, 128, 64, 8))
# Kernels whose blocks are of the vocabulary or of the hidden width; the others' time is that of a launch.
TUNED = ("statistics", "sweep", "rest", "gradient", "gather", "scatter", "transport", "transport_panels")


def setting(launch: Any) -> str:
    """What `--tune` varies, in words."""
    names = ("BLOCK", "BM", "BN", "BK", "PIECE")
    return " ".join(
        [f"{name}={launch.constants[name]}" for name in names if name in launch.constants] + [f"warps={launch.num_warps}"]
    )


def retiled(launch: Any, block: int, num_warps: int) -> Any:
    """The same work with another BLOCK: its grid, or the number of blocks of a program, follow."""
    arguments, grid = dict(launch.arguments), launch.grid
    if "block_count" in arguments:
        blocks = -(-arguments["vocab"] // block)
        arguments["block_count"] = -(-blocks // grid[1])
    else:
        grid = (grid[0], -(-arguments["width"] // block))
    constants = {**launch.constants, "BLOCK": block}
    return replace(launch, arguments=arguments, grid=grid, constants=constants, num_warps=num_warps)


def alternatives(launch: Any) -> list[Any]:
    """Other block sizes and warps; nothing for the kernels whose time is that of a launch."""
    if launch.name not in TUNED:
        return []
    if launch.name in ("transport", "transport_panels"):
        pieces = [(piece, warps) for piece in (2, 4, 8) for warps in (4, 8, 16)]
        found = [replace(launch, constants={**launch.constants, "PIECE": p}, num_warps=warps) for p, warps in pieces]
    else:
        found = [retiled(launch, block, warps) for block in BLOCKS for warps in WARPS]
    return [other for other in found if setting(other) != setting(launch)]


@dataclass(frozen=True)
class TuneRow:
    """A kernel's default beside the fastest that was tried; `failed` did not compile or run."""

    op: str
    kernel: str
    default: str
    default_ms: Spread
    best: str
    best_ms: Spread
    tried: int
    failed: int

    def cells(self) -> list[str]:
        """Its cells under HEADER."""
        times = f"{self.default_ms.median:.3f}", f"{self.best_ms.median:.3f}"
        gain = f"{self.default_ms.median / max(self.best_ms.median, 1e-9):.2f}"
        tried = f"{self.tried}" + (f", {self.failed} failed" if self.failed else "")
        return [self.op, self.kernel, self.default, times[0], self.best, times[1], gain, tried]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def tune_launch(op: str, launch: Any, others: list[Any], clock: Clock, rounds: int) -> TuneRow:
    """Time the default and the others by turns."""
    runs, failed = {setting(launch): launch.run}, 0
    launch.run()
    for other in others:
        try:
            other.run()
            clock.synchronize()
        except Exception:  # what a device cannot run is no candidate
            failed += 1
            continue
        runs[setting(other)] = other.run
    times = {name: spread_ms(taken) for name, taken in clock.interleave(runs, rounds).items()}
    best = min(times, key=lambda name: times[name].median)
    default = setting(launch)
    return TuneRow(op, label(launch), default, times[default], best, times[best], len(runs), failed)


def tune(ops: Iterator[Op], clock: Clock, rounds: int) -> Iterator[TuneRow]:
    """Every kernel worth it; launches before it run first, so that it finds what they leave."""
    for op in ops:
        for launch in op.launches:
            launch.run()
        for launch in op.launches:
            if others := alternatives(launch):
                yield tune_launch(op.name, launch, others, clock, rounds)


def tune_scores(case: Case, device: torch.device, dtype: torch.dtype, clock: Clock, rounds: int) -> TuneRow:
    """The fused scores' tiles."""
    (name, (default, *_)), *others = score_ops(case, device, dtype, (None, *SCORE_TILES))
    kept = [other.launches[0] for other in others if setting(other.launches[0]) != setting(default)]
    return tune_launch(name, default, kept, clock, rounds)
