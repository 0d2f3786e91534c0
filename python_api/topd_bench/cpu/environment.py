"""The environment of a job's process: allocator and OpenMP settings are read once, when a process starts."""

import os

# Waiting threads sleep: two that spin beside a busy process can run 10 to 40 times slower.
QUIET_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

# "tuned" keeps freed blocks in the heap: by default glibc maps every large block afresh and the kernel zeroes each of
# its pages. MALLOC_MMAP_MAX_=0 says the same to versions of glibc that refuse a threshold above 32 MiB.
MALLOC_MODES: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
}


def child_environment(malloc: str) -> dict[str, str]:
    """Return this environment with quiet OpenMP threads and exactly the named allocator settings."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    return inherited | QUIET_OPENMP | MALLOC_MODES[malloc]
