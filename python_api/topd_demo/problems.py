"""Problems that a small model solves now and then: reasoning-gym's generators at their easiest, with their scorers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from topd_demo.prompts import dataset_maker

# SmolLM2-135M-Instruct solves half of the sums and a fifth of the others (docs/demo.md).
GENERATORS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"max_value": 20},
    "lcm": {"max_value": 9},
}
HELD_OUT_SEED = 1_000_003  # beyond the seeds of training
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem of a generator.

    Attributes:
        text, answer: as the generator states them.
        entry, dataset: with which its scorer judges.
    """

    text: str
    answer: str
    entry: Any
    dataset: Any

    def is_right(self, response: str) -> bool:
        """Return whether the scorer takes the last number of a response for the answer."""
        numbers = NUMBER.findall(response.replace(",", ""))
        return bool(numbers) and self.dataset.score_answer(numbers[-1], self.entry) == 1


def make_problems(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return problems to train on and others to be judged by, the same for the same numbers and seed. No held-out one is
    trained on; those trained on come again where the generators have no more.

    Raises:
        CommandError: reasoning-gym, or a package that it needs, is not installed.
    """
    judged = _distinct(held_out, seed + HELD_OUT_SEED, set())
    kept = _distinct(train, seed, {problem.text for problem in judged})
    return [kept[i % len(kept)] for i in range(train)], judged


def _distinct(count: int, seed: int, without: set[str]) -> list[Problem]:
    """Return problems of the generators in turn, none of them twice; fewer than `count` where they run out."""
    streams = [_stream(name, max(count, 16), seed + i) for i, name in enumerate(GENERATORS)]
    seen, problems = set(without), list[Problem]()
    while streams and len(problems) < count:
        for stream in list(streams):
            problem = next((each for each in stream if each.text not in seen), None)
            if problem is None:
                streams.remove(stream)
            elif len(problems) < count:
                seen.add(problem.text)
                problems.append(problem)
    return problems


def _stream(name: str, size: int, seed: int) -> Iterator[Problem]:
    """Yield a generator's problems, some of them more than once."""
    dataset = dataset_maker()(name, size=size, seed=seed, **GENERATORS[name])
    for place in range(size):
        entry = dataset[place]
        yield Problem(entry["question"].strip(), str(entry["answer"]), entry, dataset)
