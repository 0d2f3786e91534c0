"""The options that a run of the demo has; written to config.json, from where --resume takes it."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from topd.cli.options import DEMO_METHODS, PAIRED_METHODS, SEEDS
from topd_demo.smollm2 import LAYERS


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        methods: OPD and TOPD are trained one after the other from the same start, with the same prompts and seeds; any other
            is alone.
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
        teacher, student: names or folders of transformers models; None: SmolLM2-135M-Instruct, and as the student of OPD and
            TOPD the same without some layers.
        left_out: the layers that it is without; None: those of least influence, found when the models are loaded.
        device: where torch runs.
    """

    methods: tuple[str, ...] = DEMO_METHODS
    steps: int = 20
    batch: int = 8
    tokens: int = 24
    horizon: int = 16
    learning_rate: float = 2e-4
    warmup: int = 2
    clip: float = 1.0
    evaluate_every: int = 10
    held_out: int = 12
    held_out_tokens: int = 32
    seed: int = 0
    teacher: str | None = None
    student: str | None = None
    left_out: tuple[int, ...] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: a value is of a wrong type or out of range; named, with what came.
        """
        for name in ("steps", "batch", "tokens", "horizon", "evaluate_every", "held_out", "held_out_tokens"):
            self._check(name, "a whole number of at least 1", lambda value: _whole(value, 1))
        self._check("warmup", "a whole number of at least 0", lambda value: _whole(value, 0))
        self._check("seed", f"a whole number from 0 to {SEEDS - 1:,}", lambda value: _whole(value, 0) and value < SEEDS)
        for name in ("learning_rate", "clip"):
            self._check(name, "a finite number above 0", _positive_number)
        for name in ("teacher", "student"):
            self._check(name, "null, or the name or folder of a model", lambda value: value is None or _text(value))
        self._check("device", "a device's name", _text)
        alone = [(name,) for name in PAIRED_METHODS]
        rule = f"one or both of {', '.join(DEMO_METHODS)}, or one of {', '.join(PAIRED_METHODS)}"
        self._check("methods", rule, lambda value: value in alone or _some_of(value, DEMO_METHODS))
        rule = f"null, or layers from 0 to {LAYERS - 1}, each once"
        self._check("left_out", rule, lambda value: value is None or _some_of(value, range(LAYERS)))

    @property
    def paired(self) -> bool:
        """Whether the teacher reads another prompt."""
        return self.methods[0] in PAIRED_METHODS

    def _check(self, name: str, rule: str, holds: Callable[[Any], bool]) -> None:
        """Refuse an option that does not keep a rule."""
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value!r:.60}")

    def to_json(self) -> dict[str, Any]:
        """Return the options by name, as config.json holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> "Settings":
        """Return the settings that config.json holds.

        Raises:
            ValueError: no object, a value is missing, unknown, of a wrong type or out of range.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"it must hold a JSON object, got {type(values).__name__}")
        if wrong := sorted(names ^ values.keys()):
            raise ValueError(f"{wrong[0]!r:.60} is {'missing' if wrong[0] in names else 'no option of a run'}")
        options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**options)


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _positive_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _some_of(value: object, known: Collection[object]) -> bool:
    """Return whether the value is a tuple of one or more of these, each once and of their type."""
    if not isinstance(value, tuple) or not value:
        return False
    return all(type(each) in (int, str) and each in known for each in value) and len(set(value)) == len(value)


QUICK: dict[str, Any] = {"steps": 8, "evaluate_every": 4, "held_out": 8}
# What a method that stands alone does otherwise.
ALONE: dict[str, Any] = {"steps": 30, "evaluate_every": 15, "warmup": 3}
SOLVING = ALONE | {"batch": 8, "tokens": 28, "held_out": 48, "held_out_tokens": 28}
OF_METHODS: dict[str, dict[str, Any]] = {
    "context": ALONE | {"batch": 4, "tokens": 24, "learning_rate": 6e-5, "held_out": 12, "held_out_tokens": 24},
    "opsd": SOLVING | {"learning_rate": 1e-4},
    "trd": SOLVING | {"learning_rate": 2e-5},
}
