"""The case `numerics`: digits of a KL near student = teacher.

float32 logits, V = 151,936 by default; the teacher's are the student's plus noise so small that the KL is 1e-3 to 1e-8.
Truth is fp64 on the same float32 logits, as a sum of non-negative terms p (expm1(-d) + d), d = log p - log q. Beside
topd stand the usual formula sum p (log p - log q) and TRL's function. topd and TRL are given the logits exactly: the identity
matrix as hidden states, and the logits' transpose as the weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import topd
from topd.backends import choose_backend
from topd.divergences import BY_NAME
from topd.options import BackendName
from topd_bench.catalogue import name_of
from topd_bench.losses import divergence_of_logprobs
from topd_bench.peers import trl
from topd_bench.peers.peer import not_installed
from topd_bench.records import now_record, plain_record, row_record
from topd_bench.report import note, scientific
from topd_bench.request import Request
from topd_bench.runner import Record
from topd_bench.timing import Spread

DIVERGENCES = ("reverse_kl", "forward_kl")
TARGETS = (1e-3, 1e-5, 1e-7, 1e-8)
HEADER = ("divergence", "true KL", "formula", "median relative error", "max relative error", "negative", "exactly 0", "note")


@dataclass(frozen=True)
class NumericsRow:
    """Relative errors over the rows of one target and formula, and the shares of results below 0 and exactly 0."""

    divergence: str
    target_kl: float
    true_kl: Spread
    formula: str
    error: Spread
    negative_share: float
    zero_share: float

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        error = (scientific(self.error.median), scientific(self.error.high))
        shares = (f"{self.negative_share:.0%}", f"{self.zero_share:.0%}")
        return [self.divergence, scientific(self.true_kl.median), name_of(self.formula), *error, *shares, ""]


def make_logits(rows: int, vocab: int, kl: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make student and teacher logits [R, V]; for small noise the KL is half its variance."""
    student = torch.randn(rows, vocab, generator=generator) * 2
    noise = torch.randn(rows, vocab, generator=generator) * (2 * kl) ** 0.5
    return student, student + noise


def true_kl(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Compute the KL [R] of float32 logits in fp64."""
    p, q = (side.double().log_softmax(-1) for side in (student, teacher))
    if divergence == "forward_kl":
        p, q = q, p
    d = p - q
    return (p.exp() * (torch.expm1(-d) + d)).sum(-1)


def as_products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states and weights of both sides whose products are the logits: a product with the identity is exact."""
    identity = torch.eye(student.shape[0])
    return identity, student.T.contiguous(), identity, teacher.T.contiguous()


def our_rows(student: Tensor, teacher: Tensor, divergence: str, backend: BackendName) -> Tensor:
    """Compute nats [R] by topd.linear_divergence."""
    hidden, student_weight, _, teacher_weight = as_products(student, teacher)
    heads = topd.Head(student_weight), topd.Head(teacher_weight)
    value = topd.linear_divergence(hidden, heads[0], hidden, heads[1], divergence=BY_NAME[divergence], backend=backend)
    assert isinstance(value, Tensor)
    return value


def usual_rows(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Compute nats [R] by log_softmax and sum p (log p - log q) in float32."""
    return divergence_of_logprobs(student.log_softmax(-1), teacher.log_softmax(-1), divergence)


def trl_rows(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Compute nats [R] by TRL's chunked divergence."""
    return trl.divergence(*as_products(student, teacher), divergence)


Formula = Callable[[Tensor, Tensor, str], Tensor]


def formulas_of(request: Request) -> tuple[dict[str, Formula], dict[str, str]]:
    """Return the formulas by their peers' names, and why others are missing."""
    backend = choose_backend(request.backend, torch.device("cpu"))
    formulas: dict[str, Formula] = {"ours": lambda s, t, name: our_rows(s, t, name, backend), "usual": usual_rows}
    missing = {"trl": why} if (why := not_installed("trl", "trl")) else {}
    formulas |= {} if missing else {"trl": trl_rows}
    return {n: f for n, f in formulas.items() if request.takes(n)}, {n: why for n, why in missing.items() if request.takes(n)}


@torch.no_grad()
def work(request: Request) -> Iterator[Record]:
    """Yield a row for every target and formula of one divergence."""
    rows, vocab, divergence = request.setting("rows"), request.setting("vocab"), request.loss
    heading = f"numerics: {rows} rows, V {vocab:,}, float32 logits"
    formulas, missing = formulas_of(request)
    generator = torch.Generator().manual_seed(request.setting("seed"))
    for target in TARGETS:
        note(f"numerics: {divergence} at {target:g}")
        student, teacher = make_logits(rows, vocab, target, generator)
        true = true_kl(student, teacher, divergence)
        for name, formula in formulas.items():
            yield now_record(name)
            value = formula(student, teacher, divergence)
            error = Spread.of(((value - true).abs() / true).tolist())
            negative, zero = (float(matches.float().mean()) for matches in (value < 0, value == 0))
            row = NumericsRow(divergence, target, Spread.of(true.tolist()), name, error, negative, zero)
            yield row_record(heading, HEADER, row.cells(), asdict(row))
    for name, why in missing.items():
        yield plain_record(heading, HEADER, [divergence, "-", name_of(name), *["-"] * 4, why])
