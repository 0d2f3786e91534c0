"""How many rows a chunk holds: a pure function of shapes, dtypes, bytes and backend.

A chunk's workspace is the student's and the teacher's tile of logits (the student's becomes the gradient in place) and
what the backend needs beside them.
"""

from dataclasses import dataclass

from topd.checks import positive_int

MIB = 1 << 20
CPU_WORKSPACE = 512 * MIB
CUDA_WORKSPACE = 2048 * MIB

# [C, V] temporaries that the eager backend's elementwise code keeps alive at its peak, beside the two tiles: 17 at most was
# measured, for the JSD with scores, softcap, bias and hard weight. The compiled backends keep none.
EAGER_TEMPORARIES = 18
# The same for log-probabilities with entropy, softcap and bias.
EAGER_LOGPROB_TEMPORARIES = 14


@dataclass(frozen=True)
class ChunkPlan:
    """Rows n are cut into `chunks` nearly equal chunks of at most `rows` rows; `workspace_bytes` is what they really use."""

    n: int
    rows: int
    chunks: int
    workspace_bytes: int

    def bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of each chunk, sizes differing by at most one."""
        if self.n == 0:
            return []
        return [(i * self.n // self.chunks, (i + 1) * self.n // self.chunks) for i in range(self.chunks)]


def default_workspace(device_type: str, free_bytes: int | None = None) -> int:
    """Bytes a call may use for its tiles: 512 MiB on a CPU; on a GPU 2 GiB or a quarter of the free memory if that is less."""
    if device_type == "cpu":
        return CPU_WORKSPACE
    return CUDA_WORKSPACE if free_bytes is None else min(CUDA_WORKSPACE, free_bytes // 4)


def plan_chunks(
    n: int,
    *vocabs: int,
    itemsize: int = 4,
    workspace_bytes: int,
    temporaries: int = 0,
) -> ChunkPlan:
    """Plan n rows.

    Args:
        n: rows to compute.
        vocabs: the width of each tile.
        itemsize: bytes of a tile's entry (4, or 8 for float64).
        workspace_bytes: upper bound for the tiles and temporaries together.
        temporaries: further tiles of the smallest width that the backend keeps.

    Raises:
        ValueError: the workspace does not hold one row.
    """
    positive_int("workspace_bytes", workspace_bytes)
    per_row = itemsize * (sum(vocabs) + temporaries * min(vocabs))
    limit = workspace_bytes // per_row
    if limit < 1:
        raise ValueError(
            f"workspace_bytes must hold at least one row, {per_row} bytes for vocabularies of {' and '.join(map(str, vocabs))}"
            f", got {workspace_bytes}; raise it, or leave it None for the default"
        )
    if n == 0:
        return ChunkPlan(0, 0, 0, 0)
    chunks = -(-n // limit)
    rows = -(-n // chunks)
    return ChunkPlan(n, rows, chunks, rows * per_row)
