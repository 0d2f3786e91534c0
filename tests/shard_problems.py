"""The problems on which sharded heads are compared with one process: each divergence and each option meets each vocabulary."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from compare import DIVERGENCES, OPTIONS, Model, Outcome, Problem, assert_near, by_topd, plain, random_problem
from score_truth import true_scores
from shard_cases import STARTS
from torch import Tensor

import topd

VOCABS = (5, 37, 38, 41)
LARGE = 5_003
# With logits of -inf, see `without`: they come from a bias, with no softcap after it.
ABSENT: dict[str, Any] = {
    "student": {"bias": True, "rank": 2, "scale": 0.8},
    "teacher": {"bias": True},
    "temperature": 1.3,
    "mask": True,
    "hard_weight": 0.3,
}
EVERYTHING = OPTIONS["everything"] | {"student": OPTIONS["everything"]["student"] | {"vocab": LARGE + 9}}
# Where a token that the teacher alone, or the student alone, cannot have makes no divergence infinite.
NO_TEACHER = [each for each in DIVERGENCES if not isinstance(each, topd.ReverseKL)]
NO_STUDENT = [each for each in DIVERGENCES if not isinstance(each, topd.ForwardKL)]
NEARLY = -1e5  # a bias whose token has probability 0 in float64 too; plain formulas make NaN of -inf

# What comes for each of n rows, and what was said of it.
Weights = Callable[[int], Tensor]
WEIGHTS: dict[str, tuple[Weights, Weights | None]] = {
    "sum": (lambda n: torch.ones(()).expand(n), None),
    "mean": (lambda n: torch.full((n,), 1 / n), None),
    "one deviates": (lambda n: torch.ones(n).index_fill(0, torch.tensor([4]), 0.0), None),
    "all deviate": (lambda n: torch.linspace(-1, 2, n), None),
    "hinted": (lambda n: 3 * torch.linspace(0.5, 2, n), lambda n: torch.linspace(0.5, 2, n)),
    "wrong hint": (lambda n: torch.linspace(-1, 2, n), lambda n: torch.linspace(2, 0.5, n)),
}


@dataclass(frozen=True)
class Case:
    """A problem, what it is compared with, and how the ranks cut its vocabulary.

    Attributes:
        problem: in float64.
        vocab: the entries that both sides have.
        kind: of WEIGHTS, what comes for the rows.
        infinite: the scores that are inf in every row, since one side alone cannot have a token.
    """

    problem: Problem
    vocab: int
    kind: str
    infinite: tuple[str, ...] = field(default=())

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The upstream gradient and the hint, [N] each."""
        upstream, hint = WEIGHTS[self.kind]
        n = len(self.problem.tokens)
        return upstream(n), None if hint is None else hint(n)

    def starts(self, ranks: int) -> list[tuple[int, ...]]:
        """Return the first token of each rank in so many ranks: as torch.chunk cuts, of 5 tokens the last of four ranks has
        none; of 41 tokens in uneven parts, one way after the other."""
        if self.vocab == 41:
            return STARTS[ranks]
        rows = -(-self.vocab // ranks)
        return [tuple(min(rank * rows, self.vocab) for rank in range(ranks))]

    @cached_property
    def whole_numbers(self) -> Problem:
        """The problem with a bias of NEARLY in the place of -inf, for the plain formulas."""

        def finite(model: Model) -> Model:
            return model if model.bias is None else replace(model, bias=model.bias.clamp(min=NEARLY))

        return replace(self.problem, student=finite(self.problem.student), teacher=finite(self.problem.teacher))

    @cached_property
    def truth(self) -> Outcome:
        return plain(self.whole_numbers, self.weights[0])

    @cached_property
    def rounded_truth(self) -> Outcome:
        """The truth of the problem whose numbers are rounded to float32."""
        return plain(self.whole_numbers.to(torch.float32), self.weights[0])

    def true_scores(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the scores of the problem in this dtype, computed in float64."""
        problem = self.whole_numbers.to(dtype)
        scores = true_scores(problem)
        rows = torch.ones_like(problem.tokens, dtype=torch.bool) if problem.mask is None else problem.mask
        return scores | {name: scores[name].masked_fill(rows, torch.inf) for name in self.infinite}

    @cached_property
    def alone(self) -> tuple[Outcome, topd.TokenScores]:
        """What one process makes of it in float32."""
        problem, (upstream, hint) = self.problem.to(torch.float32), self.weights
        sides = (problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head())
        options = {"tokens": problem.tokens, "mask": problem.mask, "temperature": problem.temperature}
        return by_topd(problem, "eager", upstream, weights_hint=hint), topd.score_tokens(*sides, **options)


def cases(n: int) -> dict[str, Case]:
    """Return the problems of n rows, by name."""
    return dict(_cases(n))


def _cases(n: int) -> Iterator[tuple[str, Case]]:
    kinds = list(WEIGHTS)
    for shift, (name, options) in enumerate((OPTIONS | {"absent": ABSENT}).items()):
        for number, divergence in enumerate(DIVERGENCES):
            vocab, kind = VOCABS[(shift + number) % len(VOCABS)], kinds[(5 * shift + number) % len(kinds)]
            yield (
                f"{name} {vocab} {divergence} {kind}",
                _case(8000 + 100 * shift + number, name, options, divergence, n, vocab, kind),
            )
    for number, divergence in enumerate(DIVERGENCES):
        for name, options in (("everything", EVERYTHING), ("absent", ABSENT)):
            kind = kinds[number % len(kinds)]
            yield f"{name} {LARGE} {divergence} {kind}", _case(number, name, options, divergence, n, LARGE, kind)


def _case(seed: int, name: str, options: dict[str, Any], divergence: topd.Divergence, n: int, vocab: int, kind: str) -> Case:
    torch.manual_seed(seed)
    problem = random_problem(options, divergence, n=n, vocab=vocab)
    if name != "absent":
        return Case(problem, vocab, kind)
    return Case(without(problem, vocab), vocab, kind, infinite_scores(divergence))


def without(problem: Problem, vocab: int) -> Problem:
    """Return the problem with logits of -inf: of both sides for all tokens of the second of four equal parts; of the teacher
    for the first token and of the student for the last one, where that makes no divergence infinite."""
    rows = -(-vocab // 4)
    both = torch.arange(rows, 2 * rows)
    for model in (problem.student, problem.teacher):
        model.bias[both] = -torch.inf
    if problem.divergence in NO_TEACHER:
        problem.teacher.bias[0] = -torch.inf
    if problem.divergence in NO_STUDENT:
        problem.student.bias[vocab - 1] = -torch.inf
    left = torch.tensor([token for token in range(1, vocab - 1) if token not in both])
    tokens = left[problem.tokens.clamp(min=0) % len(left)]
    return replace(problem, tokens=tokens.where(problem.tokens >= 0, problem.tokens))


def infinite_scores(divergence: topd.Divergence) -> tuple[str, ...]:
    kinds = {"reverse_kl": NO_TEACHER, "forward_kl": NO_STUDENT}
    return tuple(name for name, divergences in kinds.items() if divergence in divergences)


def assert_scores(mine: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Check the scores in float64."""
    for name, expected in true.items():
        finite, expected = expected.isfinite(), expected.double()
        assert torch.equal(mine[name].isfinite(), finite), name
        assert torch.equal(mine[name][~finite].double(), expected[~finite]), name
        assert_near(mine[name][finite].double(), expected[finite], 1e-12, name)
