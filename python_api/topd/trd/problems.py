"""The problems that a run is given: mappings, a JSONL file of them, or the rollouts of an earlier run."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from topd.trd.records import is_run, read_run

# What a run itself writes beside a problem's own fields.
OF_THE_RECORD = {"stage", "status", "reason", "text", "finish_reason", "verdict", "attempts", "tokens", "notice"}
USABLE = ("ok", "length")


class Problem(NamedTuple):
    """One problem, checked; `extra` is whatever else its mapping held."""

    id: str
    problem: str
    reference: str | None
    rollout: str | None
    extra: dict[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """The texts that are there, by name."""
        texts = {"problem": self.problem, "reference": self.reference, "rollout": self.rollout}
        return {name: text for name, text in texts.items() if text is not None}

    @property
    def mapping(self) -> dict[str, Any]:
        """What a verifier sees, and what a record keeps of it."""
        return {**self.texts, **self.extra}


def read_problems(problems: Iterable[Mapping[str, Any]] | str | Path, stage: str, with_reference: bool) -> list[Problem]:
    """Return the problems, each checked for what the stage reads.

    Raises:
        TypeError, ValueError: a field that is missing or of the wrong type, or an id that occurs twice.
    """
    source = "problems"
    if isinstance(problems, (str, Path)):
        path = Path(problems)
        source = str(path)
        rows: Iterable[Any] = _rollouts(path) if is_run(path) else _json_lines(path)
        if is_run(path) and stage != "refine":
            raise ValueError(f"{path} holds the answers of a run; stage='rollout' wants a file of problems")
    elif isinstance(problems, Mapping):
        raise TypeError("problems must be a list of mappings or the path of a file, got one mapping; put it in a list")
    else:
        rows = problems
    checked, seen = [], set[str]()
    for number, row in enumerate(rows):
        problem = _checked(row, f"{source}[{number}]", str(number), stage, with_reference)
        if problem.id in seen:
            raise ValueError(f"{source}[{number}] repeats the id {problem.id!r}; give each problem its own")
        seen.add(problem.id)
        checked.append(problem)
    return checked


def _checked(row: object, place: str, position: str, stage: str, with_reference: bool) -> Problem:
    if not isinstance(row, Mapping):
        raise TypeError(f"{place} must be a mapping with 'problem', got {type(row).__name__}")
    given = dict(row)
    id_ = given.pop("id", position)
    if isinstance(id_, bool) or not isinstance(id_, (str, int)):
        raise TypeError(f"{place} must have a text or an int as 'id', got {type(id_).__name__}")
    needed = {"problem": True, "reference": with_reference, "rollout": stage == "refine"}
    texts: dict[str, str | None] = {}
    for name, wanted in needed.items():
        text = given.pop(name, None)
        if text is None and wanted:
            cause = {"reference": "with_reference=True", "rollout": "stage='refine'"}.get(name, "every stage")
            raise ValueError(f"{place} has no {name!r}, which {cause} reads; add it")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{place} must have a text as {name!r}, got {type(text).__name__}")
        texts[name] = text
    if clash := sorted(map(str, OF_THE_RECORD & given.keys())):
        raise ValueError(f"{place} has the field {clash[0]!r}, which a record has of its own; rename it")
    try:
        json.dumps(given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{place} must hold what JSON can, since its fields are kept in the file: {error}") from error
    problem = texts["problem"]
    assert problem is not None
    return Problem(str(id_), problem, texts["reference"], texts["rollout"], given)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
            yield {"id": str(number), **row} if isinstance(row, dict) else row


def _rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Return the problems of a run with its usable answers as rollouts."""
    settings, records = read_run(path)
    if settings.get("stage") != "rollout":
        raise ValueError(f"{path} holds refined answers; stage='refine' wants the file of the rollouts")
    for record in records:
        if record["status"] in USABLE:
            own = {name: value for name, value in record.items() if name not in OF_THE_RECORD}
            yield {
                **own,
                "rollout": record["text"],
                "rollout_status": record["status"],
                "rollout_verdict": record["verdict"],
                "rollout_tokens": record.get("tokens"),
            }


def expanded(problems: Iterable[Problem], samples: int) -> Iterator[tuple[str, Problem]]:
    """Return the id of each record and its problem.

    Raises:
        ValueError: an id that two records would have.
    """
    seen = set[str]()
    for problem in problems:
        for number in range(samples):
            id_ = problem.id if samples == 1 else f"{problem.id}#{number}"
            if id_ in seen:
                raise ValueError(f"samples={samples} gives two records the id {id_!r}; rename the problem {problem.id!r}")
            seen.add(id_)
            yield id_, problem
