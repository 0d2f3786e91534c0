"""What a run of the demo is made of; written to config.json, from where --resume takes it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from topd.cli.demo.smollm2 import SLICE

METHODS = ("opd", "topd")


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        methods: trained one after the other from the same start, with the same prompts and seeds.
        steps: optimizer steps of each.
        batch: rollouts a step, one of each prompt.
        tokens: the most tokens of a response.
        horizon: tokens of a window (TOPD).
        learning_rate: of AdamW, reached after the warm-up; then it falls linearly, to a tenth at the end.
        warmup: steps of linear warm-up.
        clip: the gradient's largest norm.
        evaluate_every: steps between two evaluations on the held-out prompts; a checkpoint is written with each.
        held_out: held-out prompts.
        held_out_tokens: the most tokens of a response there.
        seed: of prompts, rollouts and windows.
        teacher, student: names or folders of transformers models; None: SmolLM2-135M-Instruct and `layers` of it.
        layers: of the teacher, that the student is a slice of.
        device: where torch runs.
    """

    methods: tuple[str, ...] = METHODS
    steps: int = 30
    batch: int = 4
    tokens: int = 24
    horizon: int = 16
    learning_rate: float = 1e-4
    warmup: int = 2
    clip: float = 1.0
    evaluate_every: int = 10
    held_out: int = 16
    held_out_tokens: int = 24
    seed: int = 0
    teacher: str | None = None
    student: str | None = None
    layers: tuple[int, ...] = SLICE
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """
        Raises:
            KeyError: a value is missing.
        """
        found: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        return cls(**found | {name: tuple(found[name]) for name in ("methods", "layers")})


QUICK: dict[str, Any] = {"steps": 8, "evaluate_every": 4, "held_out": 8}
