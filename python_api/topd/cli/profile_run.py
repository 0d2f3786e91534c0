"""`topd profile --run`: measures the planned loss on the device at hand, each way in a fresh process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import topd
from topd.cli.errors import CommandError
from topd.costs import memory
from topd.costs.call import LossCall
from topd.memory import MIB, free_bytes, size_text
from topd.profiling.devices import device_words
from topd_bench.ways import WAYS, installed

ROUNDS = 5  # calls that are timed
NARROWEST_MARGIN = 1.15  # of the memory that is free, what a measurement must leave


def device_here() -> torch.device:
    """Return the device at hand: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measured(call: LossCall, loss: str, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """Measure every way that is installed and fits.

    Returns:
        device in words, torch's threads and version, and `ways`: of each, by its name, peak_mib, seconds and kinds (topd's
        time by the kind of work), or `left_out`, why it was not measured.

    Raises:
        CommandError: topd's own measurement does not fit into memory, or fails.
    """
    peaks, free = call.peaks(call.plan()), free_bytes(device)
    ways: dict[str, Any] = {}
    for name in WAYS:
        needed = NARROWEST_MARGIN * (call.input_bytes + memory.total(peaks[name]))
        reason = None if name in installed() else "not installed"
        if free is not None and needed > free:
            reason = f"needs about {size_text(needed)} with weights and hidden states, {size_text(free)} are free"
            if name == "topd":
                raise CommandError(f"--run {reason} on this {device.type}: take fewer --tokens or a smaller --vocab, or a GPU")
        if reason:
            ways[name] = {"left_out": reason}
            continue
        print(f"topd profile: measuring {name} ...", file=sys.stderr, flush=True)
        ways[name] = _in_a_process(_asked(call, name, loss, device, trace))
    if "left_out" in ways["topd"]:
        raise CommandError(f"the measurement of topd failed: {ways['topd']['left_out']}")
    return {
        "device": device_words(device),
        "torch": torch.__version__,
        "ways": ways,
        "trace": None if trace is None else str(trace),
    }


def _asked(call: LossCall, name: str, loss: str, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """Return what a process is asked to measure."""
    ours = name == "topd"
    return {
        "name": name,
        "loss": loss,
        "dtype": str(call.dtype).removeprefix("torch."),
        "device": device.type,
        "n": call.n,
        "vocab": (call.student.vocab, call.teacher.vocab),
        "width": (call.student.hidden, call.teacher.hidden),
        "trained": call.trained,
        "rounds": ROUNDS,
        "kinds": ours,
        "trace": str(trace.absolute()) if trace is not None and ours else None,
    }


def _in_a_process(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a fresh process, or why there is none; after Ctrl-C nothing is left running."""
    package = str(Path(topd.__file__).parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="topd-profile-") as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "report.json"
        question.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "topd_bench.profile_worker", str(question), str(answer)]
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **streams) as process:
            try:
                _, errors = process.communicate()
            except BaseException:
                process.kill()
                raise
        if process.returncode or not answer.exists():
            last = (errors.strip().splitlines() or [f"its process ended with status {process.returncode}"])[-1]
            return {"left_out": f"failed: {last}"}
        report: dict[str, Any] = json.loads(answer.read_text())
        return report


def text(report: dict[str, Any]) -> str:
    """Return what was measured beside what was predicted."""
    here = report["measured"]
    lines = [
        f"MEASURED on {here['device']}, torch {here['torch']}, each in a fresh process, medians of {ROUNDS} calls",
        f"  {'':<6}  {'peak, MiB':>10}  {'predicted':>10}  {'ratio':>6}  {'time, ms':>10}  {'predicted':>10}",
    ]
    time = report["time"]
    for name, way in here["ways"].items():
        predicted = memory.total(report["memory_bytes"][name]) / MIB
        if "left_out" in way:
            lines.append(f"  {name:<6}  left out: {way['left_out']} (predicted peak {predicted:,.0f} MiB)")
            continue
        peak, ratio = "-", "-"
        if way["peak_mib"] is not None:
            peak, ratio = f"{way['peak_mib']:,.0f}", f"{way['peak_mib'] / predicted:.3f}"
        ms, expected = 1e3 * way["seconds"], f"{time['total_ms']:,.1f}" if name == "topd" and time else "-"
        lines.append(f"  {name:<6}  {peak:>10}  {predicted:>10,.0f}  {ratio:>6}  {ms:>10,.1f}  {expected:>10}")
    kinds = here["ways"]["topd"]["kinds"]
    whole = sum(kinds.values())
    lines += ["", "topd's time by kind of work (one call more, under torch.profiler, which slows it down)"]
    lines += [f"  {kind:<18}  {1e3 * part:>9,.1f} ms  {100 * part / whole:>5.1f} %" for kind, part in kinds.items()]
    return "\n".join(lines + [f"trace: {here['trace']}"] * (here["trace"] is not None))
