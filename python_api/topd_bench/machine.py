"""What a reader must know about the machine, and about the software, to judge a number."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

Facts = dict[str, str | int | bool | None]


def version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str:
    """Return the checkout's commit, with "+changes" where tracked files differ from it, or "unknown"."""
    git = ("git", "--no-optional-locks", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_facts(backend: str, malloc: str = "default") -> Facts:
    """Return the facts of a run on the CPU; `backend` is the one that runs, `malloc` the name of allocator settings."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": version("trl"),
        "libc": " ".join(platform.libc_ver()),
        "commit": git_commit(),
        "backend": backend,
        "malloc": malloc,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }


def _nvidia_smi(device: torch.device, asked: str) -> list[str]:
    """Return what nvidia-smi says of a device; nothing where it is not there."""
    # By its own name: its number is another one where CUDA_VISIBLE_DEVICES is set.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = (device.index or 0) if uuid is None else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in line.split(",")]


def gpu_clocks(device: torch.device) -> str | None:
    """Return driver, clocks and power as nvidia-smi gives them; None where it is not there."""
    values = _nvidia_smi(device, "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu")
    names = ("driver", "SM clock", "of", "power", "of", "temperature")
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=False)) or None


def most_clock(device: torch.device) -> float | None:
    """Return the highest clock of the multiprocessors in Hz; None where nvidia-smi does not say it."""
    words = " ".join(_nvidia_smi(device, "clocks.max.sm")).split()
    return float(words[0]) * 1e6 if words and words[0].isdigit() else None


def gpu_facts(device: torch.device) -> Facts:
    """Return the facts of a run on a GPU."""
    facts: Facts = {"device": "CPU, Triton's interpreter"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        facts = {"device": f"{properties.name}, {size}", "clocks": gpu_clocks(device)}
    return {
        **facts,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") or version("pytorch-triton") or version("pytorch-triton-rocm"),
        "CUDA": torch.version.cuda,
        "HIP": torch.version.hip,
        "trl": version("trl"),
        "liger": version("liger-kernel"),
        "commit": git_commit(),
        "TF32 in float32 products": torch.backends.cuda.matmul.allow_tf32,
        "bf16 sums in split products": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }
