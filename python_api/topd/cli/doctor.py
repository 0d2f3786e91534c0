"""`topd doctor`: what is installed, which backends run, and whether they compute what they should."""

import argparse
import functools
import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import topd
from topd.backends import missing_extension
from topd.divergences import BY_NAME
from topd.memory import resident_mib, total_mib
from topd.options import BackendName

HELP = "print what is installed and check that it computes what it should (seconds)"
DESCRIPTION = """\
Prints versions, backends (and why one is missing), the compiled extension,
threads and memory; then checks every backend that runs here against float64 on
small tensors. The exit status is 1 where a check fails; a C++ extension that
is not built, or that does not load, is a check that fails."""
PACKAGES = ("transformers", "trl", "peft", "accelerate", "triton", "flash-attn", "matplotlib", "rich", "gguf", "reasoning-gym")
QUIET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TOLERANCE = 2e-5


class Check(NamedTuple):
    """One line of the self-check."""

    name: str
    passed: bool
    detail: str


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    parser = commands.add_parser(
        "doctor", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)


def run(_arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if line := missing_extension():
        print(f"{line}\n")
    for title, lines in (("versions", versions()), ("backends", backends()), ("machine", machine())):
        _print(title, lines)
    start = time.perf_counter()
    results = list(checks())
    _print("self-check", [(each.name, f"{'ok' if each.passed else 'FAILED'}  {each.detail}") for each in results])
    failed = sum(not each.passed for each in results)
    verdict = f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    print(f"{verdict} in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


def _print(title: str, lines: Any) -> None:
    """Print a section."""
    print(title)
    for name, value in lines:
        print(f"  {name:15} {value}")
    print()


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of the interpreter, torch, topd and what they can work with."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    for name in ("topd", *PACKAGES):
        try:
            version = importlib.metadata.version(name)
            yield name, version + remark(name, version)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def remark(name: str, version: str) -> str:
    """Return a remark on a version that is outside the range of topd's extra of that name; else an empty text."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(text) for text in importlib.metadata.requires("topd") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return ""
    for each in needed:
        extra = each.marker is not None and each.marker.evaluate({"extra": name})
        if each.name == name and extra and version not in each.specifier:
            return f', outside of {each.specifier}: pip install "topd[{name}]"'
    return ""


def backends() -> Iterator[tuple[str, str]]:
    """Yield each backend with what it runs on, or why it is missing; and how the extension was built."""
    for name, backend in topd.backends().items():
        yield name, backend.detail if backend.available else f"missing: {backend.detail}"


def machine() -> Iterator[tuple[str, str]]:
    """Yield lines on processor, threads, memory and devices."""
    yield "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    noisy = [name for name in QUIET if name not in os.environ]
    advice = f"; on shared cores set {' and '.join(noisy)} (PASSIVE, 0)" if noisy else ""
    yield "threads", f"{torch.get_num_threads()}{advice}"
    total, used = total_mib(), resident_mib()
    if total is not None and used is not None:
        yield "memory", f"{total / 1024:.1f} GiB, this process {used / 1024:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 1024**3:.0f} GiB"
        if topd.backends()["triton"]:
            yield f"cuda:{index} blocks", block_sizes(index)
    if not torch.cuda.is_available():
        yield "gpu", "none"


def block_sizes(index: int) -> str:
    """Return whose block sizes the Triton kernels take on a GPU, or what is wrong with the user's file."""
    blocks = importlib.import_module("topd_kernels.shared.blocks")
    try:
        return str(blocks.described(torch.device("cuda", index)))
    except ValueError as error:
        return f"REFUSED: {error}"


def checks() -> Iterator[Check]:
    """Check every backend that runs here against float64, and a transport whose result is known; a missing extension fails."""
    for name, backend in topd.backends().items():
        if name == "cpp" and missing_extension():
            yield Check("cpp, cpu", False, "missing, see the first line")
        for device in _devices(backend):
            yield _checked(f"{name}, {device}", functools.partial(loss_error, backend.name, device))
    yield _checked("transport", transport_error)


def _devices(backend: topd.Backend) -> list[str]:
    """Return the devices that a backend runs on here; not Triton's interpreter, which is for tests and slow."""
    if not backend.available:
        return []
    on_gpu = ["cuda"] if torch.cuda.is_available() else []
    only = {"cpp": ["cpu"], "triton": on_gpu}
    return only.get(backend.name, ["cpu", *on_gpu])


def _checked(name: str, error: Callable[[], float]) -> Check:
    """Measure an error; one that is raised is a check that fails."""
    try:
        largest = error()
    except Exception as problem:
        return Check(name, False, f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}")
    return Check(name, largest <= TOLERANCE, f"largest relative error {largest:.0e}")


def loss_error(backend: BackendName, device: str) -> float:
    """Return the largest error of every divergence and its gradients beside float64, relative to the largest element."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((37, 24), (1001, 24), (37, 40), (1001, 40))
    given = [torch.randn(size, generator=generator) * 0.3 for size in sizes]
    worst = 0.0
    for divergence in BY_NAME.values():
        values = _loss([x.to(device) for x in given], divergence, backend)
        truth = _loss([x.double() for x in given], divergence, "reference")
        for ours, exact in zip(values, truth, strict=True):
            worst = max(worst, ((ours.cpu().double() - exact).abs().max() / exact.abs().max()).item())
    return worst


def _loss(given: list[torch.Tensor], divergence: topd.Divergence, backend: BackendName) -> list[torch.Tensor]:
    """Return a divergence and its gradients to the student's hidden states and weight."""
    hidden, weight = (x.clone().requires_grad_() for x in given[:2])
    loss = topd.linear_divergence(
        hidden, topd.Head(weight), given[2], topd.Head(given[3]), divergence=divergence, backend=backend
    )
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def transport_error() -> float:
    """Return the error of the distance between permutations of one window, which is 0, and of the plan's rows."""
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    transport = topd.near_future_divergence(tokens, tokens.flip(1), torch.eye(10), cost="cosine", epsilon=0.01)
    return max(transport.distance.abs().max().item(), (transport.plan.sum(-1) - 0.25).abs().max().item())
