"""A probe's file, and the loop that fills it: a few prompts at a time, all arms on the same tokens, written after each."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quality.probe_points import CLASSES, Settings, eligible, pick, sample_and_read, scores_of
from quality.probe_windows import DRAWS, draw
from topd import files
from topd_demo.prompts import encode

CHUNK = 16  # prompts at a time
SEEDS = 1_000_003  # of a seed's chunks
PREFIX = 24  # tokens of the text before a point that are kept

Record = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and what the student answers.

    Attributes:
        layers: of the teacher, that the student lacks.
        facts: of the machine and the software.
    """

    student: Any
    teacher: Any
    tokenizer: Any
    prompts: list[str]
    layers: list[int]
    facts: dict[str, Any]


@dataclass
class Probe:
    """Points of one student at one temperature, as they stand in a file.

    Attributes:
        layers: of the teacher, that the student lacks.
        facts: of the machine and the software, at the latest chunk.
        chunks: how many times CHUNK prompts were looked at.
        tokens: of all their responses.
        seconds: of each kind of windows.
        points: a mapping for each token looked at.
    """

    settings: Settings
    layers: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    chunks: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    points: list[Record] = field(default_factory=list)

    def least(self) -> int:
        """Return how many points the smallest class has."""
        classes = [record["class"] for record in self.points]
        return min(map(classes.count, CLASSES))

    def write(self, path: Path) -> None:
        """Write everything, a line for each point; whole or not at all."""
        values = {name: value for name, value in vars(self).items() if name != "points"} | {"settings": self.settings.to_json()}
        points = ",\n".join(json.dumps(record, ensure_ascii=False) for record in self.points)
        files.write_text(path, json.dumps(values, indent=1)[:-2] + f',\n "points": [\n{points}\n]}}\n')


def read(path: Path, settings: Settings, layers: list[int]) -> Probe:
    """Return the probe that stands in a file; an empty one where there is none.

    Raises:
        ValueError: it is damaged, or was made with other settings.
    """
    if not path.exists():
        return Probe(settings, layers)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: values[name] for name in ("layers", "facts", "chunks", "tokens", "seconds", "points")}
        asked = settings.to_json(), layers
        came = values["settings"], values["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, or name another folder with --out") from error
    if came != asked:
        raise ValueError(f"{path} holds other settings, {came}, than those asked for, {asked}: name another folder with --out")
    return Probe(settings=settings, **kept)


def fill(probe: Probe, pair: Pair, points: int, path: Path, progress: Callable[[str], None]) -> None:
    """Go on until each class has so many points; what was reached stands in the file after each CHUNK prompts.

    Raises:
        ValueError: the student's responses are too short to be looked at.
    """
    while probe.least() < points:
        tokens, records, seconds = look(pair, probe.settings, probe.chunks)
        probe.chunks += 1
        probe.facts = pair.facts
        probe.tokens += tokens
        probe.points += records
        for name, value in seconds.items():
            probe.seconds[name] = probe.seconds.get(name, 0.0) + value
        if probe.chunks * CHUNK > len(pair.prompts) and not probe.points:
            raise ValueError(f"no response was long enough to be looked at, of {len(pair.prompts)}: raise --tokens")
        probe.write(path)
        progress(f"{probe.least()} of {points} points a class, {sum(seconds.values()):.0f} s of windows for {len(records)}")


def look(pair: Pair, settings: Settings, chunk: int) -> tuple[int, list[Record], dict[str, float]]:
    """Return the response tokens of a chunk, its points, and the seconds of its windows: the same for the same seed."""
    seed = settings.seed * SEEDS + chunk
    first = chunk * CHUNK
    texts = [pair.prompts[(first + place) % len(pair.prompts)] for place in range(CHUNK)]
    prompts = encode(pair.tokenizer, texts, torch.device("cpu"))
    passes = sample_and_read(pair.student, pair.teacher, prompts, settings, seed)
    scores, generator = scores_of(passes), torch.Generator().manual_seed(seed)
    by_class = pick(scores["teacher_nll"], eligible(passes, settings.horizon), settings.share, generator)
    positions = torch.cat(list(by_class.values()))
    labels = [name for name, chosen in by_class.items() for _ in range(len(chosen))]
    tokens = int(passes.response.sum())
    if not labels:
        return tokens, [], {}
    drawn = draw(passes, positions, len(by_class["high"]), settings, seed * DRAWS)
    records = []
    for place, (label, (row, column)) in enumerate(zip(labels, positions.tolist(), strict=True)):
        ids = passes.input_ids[row, : column + 1][passes.attended[row, : column + 1]]
        windows = {
            name: each.tokens[place, : int(each.lengths[place])].tolist()
            for name, each in drawn.windows.items()
            if place < len(each.lengths)
        }
        records.append(
            {
                "class": label,
                "trajectory": first + row,
                "place": int(passes.response[row, :column].sum()),
                "prefix": ids[-1 - PREFIX : -1].tolist(),
                **{name: value[row, column].item() for name, value in scores.items()},
                "windows": windows,
            }
        )
    return tokens, records, drawn.seconds
