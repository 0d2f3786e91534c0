"""What every task has: a vocabulary, problems, worked answers in a speaker's wording, a verifier, and the surface oracle.

An answer has a fixed length. Each of its columns is either content, which follows from the problem, or a slot, where one of
six synonyms stands, any of which would do. Which synonym a speaker likes depends on the token before, by a table of its own
(`Speaker`): wording is a habit that carries nothing about the answer, and two speakers share no habit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, END, START = 0, 1, 2
SYNONYMS = 6
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True, eq=False)
class Speaker:
    """How somebody words answers.

    Attributes:
        habits: [slots, V, SYNONYMS], the probability of each synonym of a slot after each token.
    """

    habits: Tensor

    @classmethod
    def of(cls, task: "Task", seed: int, decay: float) -> "Speaker":
        """Return a speaker: after each token its synonyms have the probabilities 1, decay, decay^2, ... (normalised), in an
        order of their own that the seed draws."""
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(len(task.slots), task.vocabulary, SYNONYMS, generator=generator).argsort(-1)
        ladder = decay ** torch.arange(SYNONYMS, dtype=torch.float32)
        return cls((ladder / ladder.sum())[orders])


class Task(ABC):
    """A kind of problem.

    Attributes:
        name: of the task.
        slots: the synonyms of each kind of slot, SYNONYMS of them.
        symbols: the text of each token; ids 0, 1, 2 are padding, the end of an answer and the start of a problem.
        layout: [L] int64, for each column of an answer the slot that stands there, -1 for content.
        prompt_length: P.
    """

    name: str
    prompt_length: int

    def __init__(self, contents: list[str], slots: dict[str, str], layout: list[str]) -> None:
        """Build the vocabulary and the layout.

        Args:
            contents: the symbols that are no synonyms.
            slots: the synonyms of each slot, parted by spaces.
            layout: for each column of an answer the name of its slot, "" for content.
        """
        self.slots = [words.split() for words in slots.values()]
        assert all(len(words) == SYNONYMS for words in self.slots)
        self.symbols = ["_", "<end>", "<start>", *contents, *(word for words in self.slots for word in words)]
        assert len(set(self.symbols)) == len(self.symbols)
        self.first_content = 3
        first = 3 + len(contents)
        self.first_synonym = torch.tensor([first + SYNONYMS * place for place in range(len(slots))])
        names = list(slots)
        self.layout = torch.tensor([names.index(name) if name else -1 for name in layout])

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, V."""
        return len(self.symbols)

    @property
    def answer_length(self) -> int:
        """How many tokens a right answer has, its end token included, L."""
        return self.layout.numel()

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw problems at random, [count, P] int64."""

    @abstractmethod
    def contents(self, prompts: Tensor) -> Tensor:
        """Return the right content of each answer [n, L] int64; what stands at slots is not read."""

    @abstractmethod
    def conclusion(self) -> slice:
        """Return the columns of an answer that the verifier reads."""

    def problems(self, count: int, generator: torch.Generator, *, held_out: bool) -> Tensor:
        """Draw problems [count, P] of one of two sets that share none: those to train on, and one in eight held out."""
        weights = torch.arange(1, self.prompt_length + 1) ** 2
        parts: list[Tensor] = []
        while sum(map(len, parts)) < count:
            drawn = self.draw(HELD_OUT_ONE_IN * count if held_out else 2 * count, generator)
            chosen = (drawn * weights).sum(-1) % HELD_OUT_ONE_IN == 0
            parts.append(drawn[chosen == held_out])
        return torch.cat(parts)[:count]

    def answers(self, prompts: Tensor, speaker: Speaker, generator: torch.Generator) -> Tensor:
        """Return a right answer to each problem, [n, L] int64, in a speaker's wording."""
        answers = self.contents(prompts)
        previous = prompts[:, -1]
        for column, slot in enumerate(self.layout.tolist()):
            if slot >= 0:
                chosen = torch.multinomial(speaker.habits[slot, previous], 1, generator=generator)[:, 0]
                answers[:, column] = self.first_synonym[slot] + chosen
            previous = answers[:, column]
        return answers

    def correct(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Tell which answers [n, L] conclude rightly, [n] bool: by their last content alone, whatever the steps say."""
        columns = self.conclusion()
        return (answers[:, columns] == self.contents(prompts)[:, columns]).all(-1)

    def surface(self, answers: Tensor) -> Tensor:
        """Tell which tokens of answers [n, L] are wording alone, bool: a synonym of the slot that stands in that column."""
        first = self.first_synonym[self.layout.clamp_min(0)]
        return (self.layout >= 0) & (answers >= first) & (answers < first + SYNONYMS)

    def text(self, tokens: Tensor) -> str:
        """Return tokens [n] as text, without padding."""
        return " ".join(self.symbols[token] for token in tokens.tolist() if token != PAD)
