"""What one job of `topd bench` is asked to measure, as it goes to the job's process."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from topd.options import BackendName
from topd_bench.cases import Case

HEADS = ("trainable", "frozen")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Request:
    """A job.

    Attributes:
        case: the name of the benchmark.
        shape: of the inputs; None where the case has sizes of its own, in `settings`.
        peers: who takes part; None: everyone that the case knows.
        skip: why a peer is left out of this job, by its name.
        limit_seconds: a peer whose call takes longer is not timed.
        warm_floor: whether the products into buffers that stay are timed too; the buffers are as large as all logits.
        limit_gib: what a job may allocate; None: four fifths of what is free when it starts.
    """

    case: str
    shape: Case | None = None
    loss: str = ""
    head: str = "trainable"
    dtype: str = "float32"
    malloc: str = "default"
    peers: tuple[str, ...] | None = None
    rounds: int = 5
    backend: BackendName | None = None
    skip: dict[str, str] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)
    limit_seconds: float = LIMIT_SECONDS
    limit_gib: float | None = None
    warm_floor: bool = True

    @property
    def sizes(self) -> Case:
        """Return the shape of a case that has one."""
        assert self.shape is not None
        return self.shape

    def setting(self, name: str) -> int:
        """Return a setting that is a whole number."""
        return int(self.settings[name])

    def takes(self, peer: str) -> bool:
        """Tell whether a peer takes part."""
        return (self.peers is None or peer in self.peers) and peer not in self.skip

    def without(self, peer: str, why: str) -> "Request":
        """Return the same job with a peer left out."""
        return replace(self, skip=self.skip | {peer: why})

    def text(self) -> str:
        """Return the request as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Request":
        """Read what `text` wrote."""
        values: dict[str, Any] = json.loads(text)
        shape, peers = values["shape"], values["peers"]
        return cls(**(values | {"shape": shape and Case(**shape), "peers": None if peers is None else tuple(peers)}))

    def place(self) -> str:
        """Return where the job is, for the progress."""
        words = [self.case, *([f"{self.shape.name} N {self.shape.n:,} V {self.shape.vocab:,}"] if self.shape else [])]
        words += [word for word in (self.loss, self.head if self.loss else "", f"malloc {self.malloc}") if word]
        return ", ".join(words)
