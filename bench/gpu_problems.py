"""What the checks of `python -m bench.gpu` run on, and the runs: one call of an op on a backend, its results by name."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topd
from topd.ops.shared.plan import FUSED_BLOCK
from topd.ops.transport.spec import WindowSide
from topd.options import BackendName
from topd.scores import FIELDS

Options = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What the checks run on: rows, vocabulary, hidden widths, windows (K_S, K_T, tolerance), numbers of rows that may not make
    new binaries."""

    rows: int = 300
    vocab: int = 20_011
    widths: tuple[int, int] = (256, 192)
    beyond: int = 70
    ids: int = 50
    problems: int = 12
    windows: tuple[tuple[int, int, float], ...] = ((50, 50, 1e-6), (50, 37, 1e-6), (100, 80, 1e-6))
    counts: tuple[int, ...] = (24, 1, 2, 7, 16, 33, 64, 100, 255, 256)

    @property
    def workspace_bytes(self) -> int:
        """Several chunks."""
        return 16 * (self.vocab + self.beyond) * max(1, self.rows // 3)


TINY = Sizes(5, 37, (8, 6), 6, 3, 2, ((5, 4, 1e-6),), (3, 1, 2))

DIVERGENCES: dict[str, topd.Divergence] = {
    "reverse_kl": topd.ReverseKL(),
    "forward_kl": topd.ForwardKL(),
    "jsd": topd.JSD(),
    "forward_kl clip 0.05": topd.ForwardKL(entry_clip=0.05),
    "jsd 0.2": topd.JSD(beta=0.2),
    "skew_kl": topd.SkewKL(),
    "skew_reverse_kl": topd.SkewReverseKL(),
    "total_variation": topd.TotalVariation(),
}
# `call` goes to the function, the others make the heads.
OPTIONS: dict[str, Options] = {
    "temperature": {"call": {"temperature": 0.7}},
    "scale": {"scale": (0.3, -1.7)},
    "softcap": {"softcap": (5.0, 9.0)},
    "bias": {"bias": True},
    "larger student": {"beyond": (1, 0), "scores": True},
    "larger teacher": {"beyond": (0, 1), "scores": True},
    "hard weight": {"call": {"hard_weight": 0.6}},
    "mask": {"mask": True},
    "tokens of a larger tensor": {"call": {"hard_weight": 0.6}, "ids": 2, "scores": True},
    "scores": {"scores": True},
    "everything": {
        "call": {"temperature": 1.6, "hard_weight": 0.25},
        "scale": (0.8, -1.3),
        "softcap": (8.0, 11.0),
        "bias": True,
        "beyond": (1, 0),
        "mask": True,
        "scores": True,
    },
}


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors of one call, on the device, in the dtype under check; ids and upstream gradients for either primitive."""

    hidden: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    bias: tuple[Tensor | None, Tensor | None]
    tokens: Tensor
    mask: Tensor | None
    upstream: Tensor
    options: Options
    workspace_bytes: int

    def side(self, at: int, dtype: torch.dtype, *, trainable: bool = False) -> tuple[Tensor, topd.Head]:
        """Hidden states and head of the student (0) or teacher (1), as leaves."""

        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(dtype, copy=True).requires_grad_(trainable)

        bias = self.bias[at]
        scale, softcap = self.options.get("scale", (1.0, 1.0))[at], self.options.get("softcap", (None, None))[at]
        head = topd.Head(leaf(self.weight[at]), None if bias is None else leaf(bias), scale=scale, softcap=softcap)
        return leaf(self.hidden[at]), head


def make_problem(sizes: Sizes, device: torch.device, options: Options, dtype: torch.dtype, number: int = 0) -> Problem:
    """Random; every third row five times as large, a peaked softmax. The upstream gradients are by turns one number, one
    number but for some rows, and any numbers, which take different ways through backward."""
    generator = torch.Generator().manual_seed(number)
    rows = options.get("rows", sizes.rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    vocabs = [sizes.vocab + sizes.beyond * beyond for beyond in options.get("beyond", (0, 0))]
    peaked = torch.where(torch.arange(rows) % 3 == 0, 5.0, 1.0).unsqueeze(-1).double()
    hidden = [normal(rows, width) * peaked / math.sqrt(width) for width in sizes.widths]
    weight = [1.5 * normal(vocab, width) for vocab, width in zip(vocabs, sizes.widths, strict=True)]
    bias = [normal(vocab) if "bias" in options else None for vocab in vocabs]
    ids = torch.randint(sizes.vocab, (rows, options.get("ids", 1)), generator=generator)
    if options.get("repeats"):
        ids[:, 1::2] = ids[:, :-1:2]
    mask = (torch.rand(rows, generator=generator) < 0.6) if "mask" in options else None
    if mask is not None:
        mask[0], mask[-1] = True, rows == 1
    upstream = torch.full((), 1.0 / rows, dtype=torch.float64).expand(ids.shape)
    if number % 3 == 1:
        upstream = upstream.clone()
        upstream[::4] = 0.0
    elif number % 3 == 2:
        upstream = normal(*ids.shape)

    def pair(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[0].to(dtype).to(device), tensors[1].to(dtype).to(device)

    biases = (None, None) if bias[0] is None or bias[1] is None else pair([bias[0], bias[1]])
    there = None if mask is None else mask.to(device)
    size = sizes.workspace_bytes
    return Problem(pair(hidden), pair(weight), biases, ids.to(device), there, upstream.to(device), options, size)


def _gradients(loss: Tensor, hidden: Tensor, head: topd.Head) -> dict[str, Tensor]:
    tensors = {"d hidden": hidden, "d weight": head.weight} | ({} if head.bias is None else {"d bias": head.bias})
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def scores_of(scores: topd.TokenScores) -> dict[str, Tensor]:
    found = {name: getattr(scores, name) for name in FIELDS}
    return {name: value.double() for name, value in found.items() if value is not None}


def divergence(problem: Problem, chosen: topd.Divergence, backend: BackendName, dtype: torch.dtype) -> dict[str, Tensor]:
    """Value, gradients and, where asked for, scores by `topd.linear_divergence`."""
    hidden, student = problem.side(0, dtype, trainable=True)
    options: dict[str, Any] = {"mask": problem.mask, "tokens": problem.tokens[:, 0], **problem.options.get("call", {})}
    wanted = bool(problem.options.get("scores"))
    if backend != "reference":
        options["workspace_bytes"] = problem.workspace_bytes
    sides = (hidden, student, *problem.side(1, dtype))
    found = topd.linear_divergence(*sides, divergence=chosen, return_scores=wanted, backend=backend, **options)
    value, scores = found if isinstance(found, tuple) else (found, None)
    parts = {"value": value.detach(), **({} if scores is None else scores_of(scores))}
    upstream = problem.upstream[:, 0].to(value.dtype)
    # The loss is a sum for one number, as users write it: its gradient is then an expanded scalar.
    loss = value.sum() * upstream[0] if not any(problem.upstream.stride()) else (value * upstream).sum()
    return parts | _gradients(loss, hidden, student)


def logprobs(problem: Problem, backend: BackendName, dtype: torch.dtype) -> dict[str, Tensor]:
    """Log-probabilities, gradients and, where asked for, entropy by `topd.linear_logprobs`."""
    hidden, head = problem.side(0, dtype, trainable=True)
    options: dict[str, Any] = {"mask": problem.mask, **problem.options.get("call", {})}
    wanted = bool(problem.options.get("entropy"))
    if backend != "reference":
        options["workspace_bytes"] = problem.workspace_bytes
    found = topd.linear_logprobs(hidden, head, problem.tokens, return_entropy=wanted, backend=backend, **options)
    value, entropy = found if isinstance(found, tuple) else (found, None)
    upstream = problem.upstream.to(value.dtype)
    loss = value.sum() * upstream[0, 0] if not any(problem.upstream.stride()) else (value * upstream).sum()
    parts = {"logprobs": value.detach()}
    if entropy is not None:
        parts["entropy"] = entropy.detach()
        loss = loss + 0.3 * (entropy * upstream[:, 0].abs()).sum()
    return parts | _gradients(loss, hidden, head)


def scores(problem: Problem, backend: BackendName, dtype: torch.dtype) -> dict[str, Tensor]:
    """All scores without gradients: on triton by the fused kernels, which a workspace for few rows asks for."""
    call = {name: value for name, value in problem.options.get("call", {}).items() if name != "hard_weight"}
    options: dict[str, Any] = {"mask": problem.mask, "tokens": problem.tokens[:, 0], "return_scores": True, **call}
    with torch.no_grad():
        sides = (*problem.side(0, dtype), *problem.side(1, dtype))
        itemsize = torch.promote_types(dtype, torch.float32).itemsize
        options["workspace_bytes"] = FUSED_BLOCK * itemsize * sum(head.weight.shape[0] for head in sides[1::2])
        found = topd.linear_divergence(*sides, divergence="forward_kl", backend=backend, **options)
    assert isinstance(found, tuple)
    return scores_of(found[1])


def transported(sizes: Sizes, device: torch.device, window: tuple[int, int, float]) -> tuple[WindowSide, WindowSide]:
    """Both sides of the pairs: clustered embeddings, half of the tokens shared, some windows shorter."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(sizes.vocab, sizes.widths[0], generator=generator) + torch.randn(
        1, sizes.widths[0], generator=generator
    )
    longest = max(window[:2])
    ids = torch.randint(sizes.vocab, (2, sizes.problems, longest), generator=generator)
    ids[1] = torch.where(torch.rand(ids[1].shape, generator=generator) < 0.5, ids[0].flip(-1), ids[1])
    sides = []
    for side, length in zip(ids, window[:2], strict=True):
        lengths = torch.full((sizes.problems,), length)
        lengths[1::2] = max(1, length - 3)
        sides.append(WindowSide(table.to(device), side[:, :length].contiguous().to(device), lengths.to(device)))
    return sides[0], sides[1]
