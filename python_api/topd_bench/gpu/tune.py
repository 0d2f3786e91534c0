"""Each kernel with other block sizes and warps than its launcher's. `python -m topd_bench.gpu --tune` keeps the best of those
that topd reads from a user's file (`topd_kernels.shared.blocks`); without it nothing is changed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topd_kernels.shared.blocks import Sizes

from topd_bench.gpu.clock import DeviceClock
from topd_bench.gpu.kernels import Op, label
from topd_bench.timing import Spread, interleave, times_ms

HEADER = ("op", "kernel", "default", "time_ms", "best", "time_ms", "default / best", "tried")
BLOCKS, WARPS = (512, 1024, 2048, 4096), (2, 4, 8)
# Kernels whose blocks are of the vocabulary or of the hidden width; the others' time is that of a launch.
TUNED = ("statistics", "sweep", "rest", "gradient", "gather", "scatter", "transport", "transport_panels")


def setting(launch: Any) -> str:
    """Return what `--tune` varies, in words."""
    names = ("BLOCK", "PIECE")
    return " ".join(
        [f"{name}={launch.constants[name]}" for name in names if name in launch.constants] + [f"warps={launch.num_warps}"]
    )


def retiled(launch: Any, block: int, num_warps: int) -> Any:
    """Return the same work with another BLOCK: its grid, or the number of blocks of a program, follow."""
    arguments, grid = dict(launch.arguments), launch.grid
    if "block_count" in arguments:
        blocks = -(-arguments["vocab"] // block)
        arguments["block_count"] = -(-blocks // grid[1])
    else:
        grid = (grid[0], -(-arguments["width"] // block))
    constants = {**launch.constants, "BLOCK": block}
    return replace(launch, arguments=arguments, grid=grid, constants=constants, num_warps=num_warps)


def alternatives(launch: Any) -> list[Any]:
    """Return the launch with other block sizes and warps; none for the kernels whose time is that of a launch."""
    if launch.name not in TUNED:
        return []
    if launch.name in ("transport", "transport_panels"):
        pieces = [(piece, warps) for piece in (2, 4, 8) for warps in (4, 8, 16)]
        others = [replace(launch, constants={**launch.constants, "PIECE": p}, num_warps=warps) for p, warps in pieces]
    else:
        others = [retiled(launch, block, warps) for block in BLOCKS for warps in WARPS]
    return [other for other in others if setting(other) != setting(launch)]


@dataclass(frozen=True)
class TuneRow:
    """A kernel's default beside the fastest that was tried; `failed` did not compile or run. `key`: its name in a user's file,
    or "" where it has none; `tried_ms`: the medians of all, by block and warps."""

    op: str
    kernel: str
    default: str
    default_ms: Spread
    best: str
    best_ms: Spread
    tried: int
    failed: int
    key: str = ""
    tried_ms: Mapping[str, float] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        times = f"{self.default_ms.median:.3f}", f"{self.best_ms.median:.3f}"
        gain = f"{self.default_ms.median / max(self.best_ms.median, 1e-9):.2f}"
        tried = f"{self.tried}" + (f", {self.failed} failed" if self.failed else "")
        return [self.op, self.kernel, self.default, times[0], self.best, times[1], gain, tried]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def tune_launch(op: str, launch: Any, others: list[Any], clock: DeviceClock, rounds: int) -> TuneRow:
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
    times = {name: times_ms(samples) for name, samples in interleave(runs, rounds, clock, warm_up=False).items()}
    best = min(times, key=lambda name: times[name].median)
    default, medians = setting(launch), {name: spread.median for name, spread in times.items()}
    return TuneRow(op, label(launch), default, times[default], best, times[best], len(runs), failed, key_of(launch), medians)


def key_of(launch: Any) -> str:
    """Return the name of a launch in a user's file; "" of a kernel whose sizes no file has."""
    from topd_kernels.divergence_rows.launches import is_heavy
    from topd_kernels.shared import blocks

    if launch.name not in blocks.KERNELS:
        return ""
    read = next(name for name in ("Student", "Product", "Table", "Rows") if name in launch.arguments)
    itemsize = launch.arguments[read].itemsize
    heavy = launch.name == "sweep" and is_heavy(launch.constants["KIND"], launch.constants["SCORES"], itemsize)
    return blocks.key_of(launch.name, itemsize, heavy=heavy)


def best_sizes(rows: Iterable[TuneRow], gain: float = 1.02) -> dict[str, "Sizes"]:
    """Return the sizes that a file should hold: of each name in it those with which all its launches together take least, where
    that is at least `gain` times faster than the defaults. What one of them could not run with is no candidate."""
    from topd_kernels.shared.blocks import Sizes

    by_key: dict[str, list[TuneRow]] = defaultdict(list)
    for row in rows:
        if row.key:
            by_key[row.key].append(row)
    best = {}
    for key, together in by_key.items():
        common = set.intersection(*(set(row.tried_ms) for row in together))
        total = {name: sum(row.tried_ms[name] for row in together) for name in common}
        fastest = min(total, key=lambda name: (total[name], name))
        if sum(row.default_ms.median for row in together) >= gain * total[fastest]:
            block, num_warps = (int(part.partition("=")[2]) for part in fastest.split())
            best[key] = Sizes(block, num_warps)
    return best


def tune(op: Op, clock: DeviceClock, rounds: int) -> Iterator[TuneRow]:
    """Yield every kernel that is worth it; launches before it run first, so that it finds what they leave."""
    for launch in op.launches:
        launch.run()
    for launch in op.launches:
        if others := alternatives(launch):
            yield tune_launch(op.name, launch, others, clock, rounds)
