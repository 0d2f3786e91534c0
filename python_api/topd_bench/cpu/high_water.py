"""The high-water mark of this process's resident memory. Linux only."""

from topd.memory import resident_mib, settled_mib


def high_water_mib() -> float:
    """Return VmHWM of this process."""
    mib = resident_mib("VmHWM")
    if mib is None:
        raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")
    return mib


def settle() -> float:
    """Give free pages back and reset the high-water mark; return the baseline, what is resident then, in MiB."""
    mib = settled_mib()
    if mib is None:
        raise RuntimeError("the kernel did not reset VmHWM (/proc/self/clear_refs): this benchmark needs Linux")
    return mib
