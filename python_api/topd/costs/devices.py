"""The devices that the account predicts for: what their makers publish of them. docs/gpu.md names the sources."""

from typing import NamedTuple

# Of the dense 16-bit peak, what a large matrix product reaches.
PRODUCT_SHARE = 0.7
# What a training step holds beside the loss: weights, optimizer, activations. An assumption.
TAKEN_BYTES = 30e9


class Device(NamedTuple):
    """A device. Its multiprocessors (compute units) issue instructions to so many lanes a cycle: four schedulers, a warp of 32
    each; on AMD four vector units of 16 lanes, each a wave of 64 in four cycles."""

    name: str
    target: str
    processors: int
    lanes: int
    clock: float  # Hz
    matrix_flop: float  # a second, dense 16-bit, the peak
    bandwidth: float  # bytes a second
    memory_bytes: float

    @property
    def product_flop(self) -> float:
        """Return the floating-point operations of matrix products a second."""
        return PRODUCT_SHARE * self.matrix_flop

    @property
    def issue_rate(self) -> float:
        """Return how many instructions of a thread are issued a second."""
        return self.processors * self.lanes * self.clock

    @property
    def available_bytes(self) -> int:
        """Return the memory that is there for the loss."""
        return int(self.memory_bytes - TAKEN_BYTES)


DEVICES = [
    Device("H100 SXM", "sm_90", 132, 128, 1.755e9, 989e12, 3.35e12, 80e9),
    Device("H200", "sm_90", 132, 128, 1.755e9, 989e12, 4.8e12, 141e9),
    Device("B200", "sm_100", 148, 128, 1.755e9, 2250e12, 8.0e12, 180e9),
    Device("A100 SXM 80GB", "sm_80", 108, 128, 1.41e9, 312e12, 2.04e12, 80e9),
    Device("MI300X", "gfx942", 304, 64, 2.1e9, 1307e12, 5.3e12, 192e9),
]
