"""topd.linear_logprobs where digits are easily lost: the logits are exact, the truth is float64 on those logits."""

import math
from dataclasses import replace

import compare
import pytest
import torch
from compare import Model, Outcome
from logprob_cases import Problem, by_topd, plain, random_problem
from torch import Tensor

import topd

INF = math.inf
N = 48


def from_logits(logits: Tensor, ids: Tensor) -> Problem:
    """Rows [N, V] of logits through a hidden state of unit vectors: every product and sum of the head is exact."""
    return Problem(Model(torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous()), ids)


def to_logits(problem: Problem, backend: str | None, upstream: Tensor) -> Outcome:
    """Value and the gradient to the logits [N, V], which is that of the weight; the truth where backend is None."""
    arguments = {"upstream": upstream.to(problem.ids.device), "trainable": ("weight",)}
    outcome = by_topd(problem, backend, **arguments) if backend else plain(problem, **arguments)
    return Outcome(outcome.value, {"logits": outcome.grads["weight"].T})


def assert_digits(value: Tensor, true: Tensor, rtol: float = 1e-5) -> None:
    """Every element relative to itself."""
    torch.testing.assert_close(value.double(), true, rtol=rtol, atol=0)


def from_bias(bias: list[float], ids: list[int], dtype: torch.dtype = torch.float32) -> Problem:
    """One row whose logits are a bias, which may be -inf."""
    nothing = torch.zeros(len(bias), 1, dtype=dtype)
    return Problem(Model(nothing[:1], nothing, torch.tensor(bias, dtype=dtype)), torch.tensor([ids], dtype=torch.int64))


FORBIDDEN = {
    "another": ([0.3, -INF, 1.0, -2.0], [0, 2], [0.5, -1.5]),
    "chosen, upstream 0": ([0.3, -INF, 1.0, -2.0], [1, 0], [0, 2.0]),
    "chosen, upstream 1": ([0.3, -INF, 1.0, -2.0], [1, 0], [1.0, 2.0]),
    "chosen twice": ([0.3, -INF, 1.0, -2.0], [1, 1], [1.0, -3.0]),
    "all others": ([-INF, -INF, 1.0, -INF], [2, 0], [1.0, 0.5]),
    "none left outside": ([0.3, -INF, 1.0, -INF], [2, 0], [1.0, 0.5]),
    "underflowing": ([0.3, -200.0, 1.0, -2.0], [1, 0], [1.0, 0.5]),
}


@pytest.mark.parametrize("entropy", [0.0, 1.0], ids=["", "entropy"])
@pytest.mark.parametrize(("bias", "ids", "upstream"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_probabilities_of_zero(bias, ids, upstream, entropy, backend, device):
    """Log-probability -inf there alone, a finite entropy; gradients are those of ever smaller probabilities."""
    problem, grad = from_bias(bias, ids).to(device), torch.tensor([[*upstream, entropy]], device=device)
    outcome = by_topd(problem, backend, grad, trainable=("bias", "hidden"))
    expected = torch.tensor(bias, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(outcome.value[0, :2].double().cpu(), expected[ids], rtol=1e-6, atol=1e-7)
    finite = expected[expected.isfinite()]
    assert outcome.value[0, 2].item() == pytest.approx(-(finite.exp() * finite).sum().item(), rel=1e-6, abs=1e-7)
    limit = replace(problem, model=replace(problem.model, bias=problem.model.bias.clamp(min=-600)))
    true = plain(limit, grad, trainable=("bias",)).grads["bias"]
    torch.testing.assert_close(outcome.grads["bias"].double(), true, rtol=1e-5, atol=1e-6)
    assert outcome.grads["hidden"].isfinite().all()


def test_a_forbidden_id_beside_ordinary_rows_leaves_every_gradient_finite(backend, device):
    """A bias of -inf is masked out of the loss by torch.where; weight and hidden gradients are those of the other ids."""
    problem = random_problem({"bias": True}, n=9, m=3, entropy=False).to(device)
    problem.model.bias[5] = -INF
    problem.ids[::2, 1] = 5
    leaves = problem.model.leaves(compare.TENSORS)
    logprobs = topd.linear_logprobs(leaves.hidden, leaves.head(), problem.ids, backend=backend)
    assert torch.equal(logprobs.isneginf(), problem.ids == 5)
    torch.where(problem.ids == 5, 0.0, logprobs).square().sum().backward()
    with torch.no_grad():
        upstream = torch.where(problem.ids == 5, 0.0, 2 * logprobs)
    truth = plain(problem, upstream).grads
    for name in ("hidden", "weight", "bias"):
        compare.assert_near(getattr(leaves, name).grad, truth[name], 1e-11, name)


@pytest.mark.parametrize("m", [1, 4, 40])
def test_huge_one_hot_and_flat_logits(m, backend, device):
    """Up to 1e4, flat rows, and flat ones that stand at 1e4."""
    eye, flat = torch.eye(40), torch.zeros(1, 40)
    rows = torch.cat([1e4 * eye[:3], -1e4 * eye[:2], flat, flat + 1e4, flat - 1e4, 1e4 * torch.randn(4, 40)])
    ids = torch.stack([torch.randperm(40)[:m] for _ in rows])
    ids[:, 0] = rows.argmax(-1)
    problem = from_logits(rows, ids).to(device)
    upstream = torch.randn(12, m + 1)
    outcome, true = to_logits(problem, backend, upstream), to_logits(problem, None, upstream)
    assert outcome.value.isfinite().all()
    torch.testing.assert_close(outcome.value.double(), true.value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outcome.grads["logits"].double(), true.grads["logits"], rtol=1e-4, atol=1e-6)


def test_all_equal_logits(backend, device):
    """Each log-probability is -log V, the entropy log V, the gradient g at the id less a V-th part of the sum."""
    problem = from_logits(torch.full((2, 8), 3.5), torch.tensor([[0, 7], [4, 4]])).to(device)
    outcome = to_logits(problem, backend, torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 5.0]]))
    torch.testing.assert_close(
        outcome.value.cpu(), torch.tensor([-1.0, -1.0, 1.0]).expand(2, 3) * math.log(8), rtol=1e-6, atol=0
    )
    expected = torch.stack([torch.eye(8)[0] + 2 * torch.eye(8)[7] - 3 / 8, 2 * torch.eye(8)[4] - 2 / 8])
    torch.testing.assert_close(outcome.grads["logits"].cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vocabulary_of_one_is_exactly_zero(dtype, m, backend, device):
    """Without rounding, also where the one token is asked for several times. Autograd on a GPU, the backend "reference" there,
    takes the sum of the upstreams in two orders."""
    problem = random_problem({"bias": True}, n=5, m=m, vocab=1).to(device).to(dtype)
    outcome = by_topd(problem, backend, problem.upstream())
    assert not outcome.value.any()
    largest = 50 * torch.finfo(dtype).eps if device.type == "cuda" and backend == "reference" and m > 1 else 0.0
    assert all(grad.abs().max() <= largest for grad in outcome.grads.values() if grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_that_cover_the_whole_vocabulary(dtype, backend, device):
    """Nothing lies outside them, in any order."""
    problem = random_problem({"bias": True, "rank": 2}, n=11, m=1, vocab=23).to(device)
    ids = torch.stack([torch.randperm(23) for _ in range(11)]).to(device)
    problem = replace(problem, ids=ids).to(dtype)
    upstream = problem.upstream()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    compare.assert_outcome(by_topd(problem, backend, upstream), plain(problem, upstream), tolerance)


GAPS = (2.0, 5.0, 10.0, 15.0, 20.0, 25.0)


def peaked(vocab: int = 64) -> Tensor:
    """Rows with all but about vocab exp(-gap) of their probability on entry 9: at a gap of 25 that is 1 - 1e-9."""
    rows = 0.3 * torch.randn(len(GAPS), vocab)
    rows[:, 9] = torch.tensor(GAPS)
    return rows


CHOSEN = {
    "alone": [9],
    "first": [9, 3],
    "last": [3, 4, 9],
    "without it": [3, 4],
    "among all": list(range(64)),
}


def assert_conditioned(outcome: Outcome, true: Outcome, problem: Problem, upstream: Tensor) -> None:
    """The gradient to each logit, to 1e-5 of the positive and negative parts it is the sum of: g (1 - p), p times the other
    upstream gradients, and for the entropy p |log p| and p times the entropy."""
    logprobs = problem.model.logits().double().log_softmax(-1)
    p, size, m = logprobs.exp(), upstream.abs().double().to(problem.ids.device), problem.ids.shape[1]
    own = torch.zeros_like(p).scatter_add(-1, problem.ids, size[:, :m])
    rest = -torch.expm1(logprobs)
    parts = own * rest + p * (size[:, :m].sum(-1, keepdim=True) - own)
    if problem.entropy:
        parts += size[:, m:] * p * (logprobs.abs() + true.value[:, m:])
    assert ((outcome.grads["logits"].double() - true.grads["logits"]).abs() <= 1e-5 * parts).all()


@pytest.mark.parametrize("ids", CHOSEN.values(), ids=CHOSEN.keys())
def test_peaked_rows_keep_the_digits_of_value_and_gradient(ids, chunked, device):
    """p = 1 - 1e-9 rounds to 1 in float32; its logarithm, and its gradient, which is minus the sum of all others, are kept."""
    problem = replace(from_logits(peaked(), torch.tensor(ids).expand(len(GAPS), -1)), entropy=False).to(device)
    ones = torch.ones(len(GAPS), len(ids))
    for upstream in (ones, 1 / ones.cumsum(-1), ones * (torch.tensor(ids) == 9)):
        outcome, true = to_logits(problem, chunked, upstream), to_logits(problem, None, upstream)
        assert_digits(outcome.value, true.value)
        assert_conditioned(outcome, true, problem, upstream)


@pytest.mark.parametrize("gap", [40.0, 60.0, 80.0])
def test_a_token_all_but_certain_keeps_its_digits(gap, chunked, device):
    """Entries of gaps (0, gap, gap): log p is -2 exp(-gap) but for its square, too near 1 even for float64."""
    rest = math.exp(-gap)
    problem = replace(from_logits(torch.tensor([[gap, 0.0, 0.0]]), torch.tensor([[0, 1]])), entropy=True).to(device)
    outcome = to_logits(problem, chunked, torch.tensor([[1.0, 0.0, 0.0]]))
    assert outcome.value[0].tolist() == pytest.approx([-2 * rest, -gap, 2 * rest * (1 + gap)], rel=1e-5)
    assert outcome.grads["logits"][0].tolist() == pytest.approx([2 * rest, -rest, -rest], rel=1e-5)


def test_the_cross_entropy_of_a_peaked_token_keeps_its_digits(chunked, device):
    """Hidden gradients too, where the id's row of the weight is all but cancelled by the others."""
    problem = replace(from_logits(peaked(), torch.full((len(GAPS), 1), 9)), entropy=False).to(device)
    upstream = -torch.ones(len(GAPS), 1, device=device)
    outcome, true = by_topd(problem, chunked, upstream), plain(problem, upstream)
    assert_digits(outcome.value, true.value)
    assert_digits(outcome.grads["weight"], true.grads["weight"])
    for row, true_row in zip(outcome.grads["hidden"], true.grads["hidden"], strict=True):
        compare.assert_near(row, true_row, 1e-5, "hidden")


def test_a_peaked_token_asked_for_twice_keeps_the_digits_of_its_gradient(chunked, device):
    """Two ids of one token are that token once with the sum of their upstream gradients."""
    twice = replace(from_logits(peaked(), torch.full((len(GAPS), 2), 9)), entropy=False).to(device)
    once = replace(twice, ids=twice.ids[:, :1])
    upstream = torch.tensor([1.5, 0.25]).expand(len(GAPS), 2)
    outcome, true = to_logits(twice, chunked, upstream), to_logits(once, None, upstream.sum(-1, keepdim=True))
    assert_digits(outcome.grads["logits"], true.grads["logits"])


@pytest.mark.parametrize("ids", [[9], [3, 4], []], ids=["peak", "others", "none"])
def test_the_entropy_of_peaked_rows_keeps_its_digits(ids, chunked, device):
    problem = from_logits(peaked(), torch.tensor(ids, dtype=torch.int64).expand(len(GAPS), -1)).to(device)
    upstream = torch.cat([torch.zeros(len(GAPS), len(ids)), torch.ones(len(GAPS), 1)], -1)
    outcome, true = to_logits(problem, chunked, upstream), to_logits(problem, None, upstream)
    assert_digits(outcome.value[:, -1], true.value[:, -1])
    assert_conditioned(outcome, true, problem, upstream)


BROKEN = {"nan": [0.0, math.nan, 1.0], "inf": [0.0, INF, 1.0], "-inf": [-INF, -INF, -INF]}


@pytest.mark.parametrize("ids", [[0], [1], [0, 2], [0, 1, 2], []], ids=str)
@pytest.mark.parametrize("bias", BROKEN.values(), ids=BROKEN.keys())
def test_a_row_without_a_distribution_is_nan_not_a_number_that_looks_right(bias, ids, backend, device):
    assert by_topd(from_bias(bias, ids).to(device), backend).value.isnan().all()


FULL = {"bias": True, "rank": 2}


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("hint", [False, True], ids=["", "hint"])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(  # a softcap makes infinities finite
    ("bad", "softcap"), [(torch.nan, None), (torch.nan, 9.0), (torch.inf, None), (-torch.inf, None)], ids=str
)
def test_rows_that_are_not_finite_and_have_no_upstream_gradient_leave_clean_gradients(
    bad, softcap, m, hint, entropy, backend, device
):
    problem = random_problem(FULL | {"softcap": softcap}, n=N, m=m, entropy=entropy).to(device)
    clean = replace(problem, mask=torch.arange(N, device=device) % 11 != 4)
    problem.model.hidden[4::11] = bad
    for grad in (torch.ones_like(problem.upstream()), problem.upstream()):
        grad = grad * clean.mask.unsqueeze(-1)
        options = {"weights_hint": torch.ones(N, device=device)} if hint else {}
        outcome, truth = by_topd(problem, backend, grad, **options), plain(clean, grad)
        assert outcome.value[4::11].isnan().all()
        compare.assert_outcome(replace(outcome, value=truth.value), truth, 1e-11)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("uniform", [True, False], ids=["sum", "weights"])
def test_rows_that_are_not_finite_and_have_an_upstream_gradient_propagate(uniform, m, backend, device):
    """To their own row of the hidden gradient and to the head's: a broken batch is not trained on in silence."""
    problem = random_problem(FULL, n=N, m=m, entropy=False).to(device)
    problem.model.hidden[4] = torch.nan
    upstream = torch.ones((), dtype=torch.float64, device=device).expand(N, m) if uniform else problem.upstream()
    grads = by_topd(problem, backend, upstream).grads
    assert grads["hidden"][4].isnan().all()
    assert grads["hidden"][torch.arange(N, device=device) != 4].isfinite().all()
    for name in ("weight", "bias", "b"):
        assert grads[name].isnan().all(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [1, 3])
def test_masked_rows_change_nothing_whatever_they_hold(m, bad, backend, device):
    """NaN or inf states and ids of -100 behind the mask, NaN in their upstream gradient and in the hint."""
    problem = random_problem(FULL | {"mask": True}, n=N, m=m).to(device)
    upstream = problem.upstream() * problem.mask.unsqueeze(-1)
    expected = by_topd(problem, backend, upstream)
    problem.model.hidden[~problem.mask] = bad
    hint = upstream[:, :m].sum(-1).masked_fill(~problem.mask, bad)
    for grad, options in ((upstream, {}), (upstream.masked_fill(~problem.mask.unsqueeze(-1), bad), {"weights_hint": hint})):
        outcome = by_topd(problem, backend, grad, **options)
        assert torch.equal(outcome.value, expected.value)
        for name, true in expected.grads.items():
            compare.assert_near(outcome.grads[name], true, 1e-12, name)
        assert not outcome.grads["hidden"][~problem.mask].any()
