"""topd::logprob_rows, the Triton kernels, on given tiles: the reference in float64, and eager torch's float32; and the public
functions made of them, against the reference in float64."""

import math

import compare
import pytest
import torch
import torch.nn.functional as F
from compare import TENSORS, Outcome, random_model
from torch import Tensor
from triton_cases import (
    DEVICE,
    FLOAT32,
    NEEDS_TRITON,
    PLAIN,
    STORED,
    assert_logprobs,
    assert_within,
    logprob_outcome,
    logprobs_by_triton,
    logprobs_truth,
    rounded,
)

import topd
from topd.losses.linear_logprobs import logprobs_and_outside
from topd.ops.linear_logprobs.spec import LogprobRows, LogprobSpec

pytestmark = NEEDS_TRITON
INF, NAN = math.inf, math.nan
OPTIONS = LogprobSpec(-0.7, 20.0, 1.3)
N, VOCAB = 6, 19


def random_case(rows: int, width: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows from flat to peaked, one far from 0; ids with repeats, the largest entry, and ids outside on both sides."""
    logits = torch.randn(rows, width, dtype=torch.float64) * torch.linspace(0.1, 9, rows).unsqueeze(-1)
    logits += 40.0 * (torch.arange(rows) % 4 == 1).unsqueeze(-1)
    ids = torch.randint(width, (rows, count))
    ids[::3, :1] = logits.argmax(-1, keepdim=True)[::3]
    ids[1::3, -1:] = ids[1::3, :1]
    ids[2::5, :1] = -1
    ids[3::5, -1:] = width
    return logits.to(dtype), ids


def assert_same(result: LogprobRows, expected: LogprobRows) -> None:
    for name, a, b in zip(LogprobRows._fields, result, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("count", [0, 1, 5, 50])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every option"])
def test_numbers_of_ids(plain, count, dtype):
    """Of 130 entries; with scale, softcap, temperature and bias, or without."""
    logits, ids = random_case(4, 130, count, dtype)
    spec, bias = (PLAIN, None) if plain else (OPTIONS, torch.randn(130, dtype=dtype))
    result = logprobs_by_triton(logits, ids, spec, bias=bias)
    assert result.slope.shape == (0 if plain else 4, count)
    assert_logprobs(result, logits, ids, spec, bias=bias)


def test_more_ids_than_a_block_with_repeats_across_blocks():
    logits, ids = random_case(2, 90, 200)
    result = logprobs_by_triton(logits, ids)
    assert_logprobs(result, logits, ids)
    inside = [row[(row >= 0) & (row < 90)].unique().numel() for row in ids]
    assert result.first.sum(-1).tolist() == inside


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_numbers_of_rows(rows):
    """70 are more than a program that combines takes."""
    logits, ids = random_case(rows, 3, 1)
    result = logprobs_by_triton(logits, ids, entropy=rows < 70)
    assert result.entropy.shape == (rows if rows < 70 else 0,)
    assert_logprobs(result, logits, ids)


@pytest.mark.parametrize("width", [1, 13, 1000, 4099])
def test_widths(width):
    logits, ids = random_case(3, width, 5, torch.float32)
    assert_logprobs(logprobs_by_triton(logits, ids), logits, ids)


@pytest.mark.parametrize("splits", [1, 3, 7])
def test_programs_that_share_a_row(splits):
    """Three blocks: of seven programs four have nothing to do. A largest entry in each part, parts that are all chosen or all
    left out; two runs give the same bits."""
    logits, ids = random_case(4, 2100, 5)
    logits[torch.arange(3), torch.tensor([3, 1500, 2090])] += 60
    logits[3, :1024] = -INF
    result = logprobs_by_triton(logits, ids, splits=splits)
    assert_logprobs(result, logits, ids)
    if splits == 3:
        assert_same(logprobs_by_triton(logits, ids, splits=splits), result)


@pytest.mark.parametrize("grad", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_in_tiles_of_their_own_are_the_rounded_ones(grad):
    """The entropy's too, also at the ids; what is not asked for is empty, and what is keeps its bits."""
    logits, ids = random_case(3, 200, 4, torch.float32)
    inside, apart = logprobs_by_triton(logits, ids), logprobs_by_triton(logits, ids, grad=grad)
    assert_same(apart._replace(outside_grad=None, entropy_grad=None), inside._replace(outside_grad=None, entropy_grad=None))
    for result, full in ((apart.outside_grad, inside.outside_grad), (apart.entropy_grad, inside.entropy_grad)):
        assert (result is None) == (grad is None)
        if grad is not None:
            assert torch.equal(result, rounded(full, grad))
            assert result.any(-1).all()
    alone = logprobs_by_triton(logits, ids, grad=grad, entropy=False)
    assert_same(alone, apart._replace(entropy=alone.entropy, entropy_grad=None))


@pytest.mark.parametrize("spec", [PLAIN, LogprobSpec(1.0, 20.0, 1.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_the_whole_vocabulary_chosen_leaves_nothing_outside(dtype, spec):
    logits = 3 * torch.randn(3, 6, dtype=dtype)
    ids = torch.stack([torch.randperm(6) for _ in range(3)])[:, [0, 1, 2, 3, 4, 5, 0]]
    ids[2, 5] = ids[2, 4]  # one entry is not chosen here
    result = logprobs_by_triton(logits, ids, spec)
    assert result.outside.isneginf().tolist() == [True, True, False]
    assert result.outside_grad.any(-1).tolist() == [False, False, True]
    assert_logprobs(result, logits, ids, spec)
    torch.testing.assert_close(result.logprobs[:2, :6].double().logsumexp(-1), torch.zeros(2).double(), rtol=0, atol=1e-6)


def test_a_certain_token_keeps_the_digits_of_its_log_probability():
    """p = 1 - 1e-9, chosen or not, among logits of 1e4, and with what is left of the mass in the tile or at another id."""
    logits = torch.randn(5, 120)
    logits[torch.arange(5), 17] = 25.0
    logits[1] += 1e4
    logits[3, 40] = 20.0
    ids = torch.tensor([[17, 3], [17, 3], [5, 3], [17, 40], [40, 17]])
    result, true = logprobs_by_triton(logits, ids), logprobs_truth(logits, ids)
    assert_logprobs(result, logits, ids)
    assert (-true.logprobs[0, 0]).log10().item() == pytest.approx(-8.5, abs=0.5)
    likely = (torch.tensor([0, 1, 3, 4]), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(result.logprobs[likely].double(), true.logprobs[likely], rtol=3e-6, atol=0)
    torch.testing.assert_close(result.outside[2].double(), true.outside[2], rtol=3e-6, atol=0)
    torch.testing.assert_close(result.entropy.double(), true.entropy, rtol=3e-6, atol=0)


def test_probabilities_of_zero():
    """Left out by a bias of -inf: at an id, outside the ids, all but one, all outside the ids."""
    logits, ids = random_case(4, 9, 3)
    ids[:] = torch.tensor([0, 4, 4])
    bias = torch.zeros(9, dtype=torch.float64)
    bias[[4, 7]] = -INF
    logits[1, 1:] = logits[2, 1:] = logits[3, :4] = -INF
    logits[2, 0], logits[2, 3] = -INF, 2.0
    result = logprobs_by_triton(logits, ids, bias=bias)
    assert_logprobs(result, logits, ids, bias=bias)
    assert result.finite.all()
    assert result.logprobs[:, 1:].isneginf().all()
    assert result.logprobs[1, 0] == 0
    assert result.outside.isneginf().tolist() == [False, True, False, False]
    assert result.entropy[[1, 2]].tolist() == [0, 0]


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_without_a_distribution_stand_alone(splits):
    """NaN and +inf, at an id, repeated, and elsewhere; nothing but -inf."""
    logits, ids = random_case(8, 1100 if splits == 2 else 9, 3)
    ids[:] = torch.tensor([2, 5, 2])
    logits[1, 2] = logits[2, 3] = logits[3, -1] = NAN
    logits[4, 5] = logits[5, 0] = INF
    logits[6] = -INF
    result = logprobs_by_triton(logits, ids, splits=splits)
    kept = torch.tensor([True, *[False] * 6, True])
    assert torch.equal(result.finite, kept)
    for value in (result.logprobs[:, 0], result.logprobs[:, 2], result.entropy, result.outside):
        assert value.isnan().tolist() == (~kept).tolist()
    assert result.outside_grad.any(-1).tolist() == kept.tolist()
    assert result.entropy_grad.any(-1).tolist() == kept.tolist()
    assert_logprobs(result, logits, ids)


def test_no_token_has_no_effect():
    """Ids of -1 among others change nothing about the rest, to the bit."""
    logits, ids = torch.randn(2, 60), torch.randint(60, (2, 2))
    none = torch.full_like(ids[:, :1], -1)
    alone = logprobs_by_triton(logits, ids)
    padded = logprobs_by_triton(logits, torch.cat([none, ids[:, :1], none, ids[:, 1:]], -1))
    assert padded.logprobs[:, ::2].isneginf().all()
    assert not padded.first[:, ::2].any()
    by_id = {name: getattr(padded, name)[:, 1::2] for name in ("logprobs", "first", "slope")}
    assert_same(padded._replace(**by_id), alone)


def test_no_rows():
    empty = logprobs_by_triton(torch.empty(0, 5), torch.empty(0, 3, dtype=torch.int64), grad=torch.bfloat16)
    assert [tuple(part.shape) for part in empty] == [(0, 3), (0,), (0,), (0, 3), (0, 3), (0,), (0, 5), (0, 5)]


def test_a_row_by_hand():
    """p = (1/2, 1/4, 1/8, 1/8), the second and twice the third chosen: outside are 1/2 and 1/8."""
    ln = math.log
    logits = torch.tensor([[7 + ln(4), 7 + ln(2), 7.0, 7.0]], dtype=torch.float64)
    result = logprobs_by_triton(logits, torch.tensor([[1, 2, 2]]))
    entropy = ln(2) / 2 + ln(4) / 4 + 2 * ln(8) / 8
    assert result.logprobs[0].tolist() == pytest.approx([-ln(4), -ln(8), -ln(8)], rel=1e-14)
    assert result.first.tolist() == [[True, True, False]]
    assert result.outside.item() == pytest.approx(ln(5 / 8), rel=1e-14)
    assert result.outside_grad[0].tolist() == pytest.approx([4 / 5, 0, 0, 1 / 5], rel=1e-14)
    assert result.entropy.item() == pytest.approx(entropy, rel=1e-14)
    each = [-p * (ln(p) + entropy) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8)]
    assert result.entropy_grad[0].tolist() == pytest.approx(each, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize(
    ("given", "entropy", "hint"),
    [
        ("plain", False, "none"),
        ("plain", True, "right"),
        ("everything", False, "wrong"),
        ("everything", True, "none"),
        ("everything", True, "wrong"),
    ],
)
def test_logprobs_and_all_gradients(given, entropy, hint):
    """Repeated ids, upstream gradients of their own, chunks of two rows; float32."""
    everything = {"bias": True, "rank": 2, "softcap": 8.0, "scale": 0.8} if given == "everything" else {}
    model = random_model(N, VOCAB, 7, **everything).to(DEVICE).to(torch.float32)
    ids = torch.randint(VOCAB, (N, 4), device=DEVICE)
    ids[:, 3] = ids[:, 1]
    upstream = [torch.randn(N, 4, device=DEVICE), *([torch.randn(N, device=DEVICE)] if entropy else [])]
    options = {"temperature": 1.6, "mask": torch.arange(N, device=DEVICE) != 3} if everything else {}
    guess = {"none": None, "right": -2 * upstream[0].sum(-1), "wrong": torch.randn(N, device=DEVICE)}[hint]
    true = logprob_outcome(model, ids, "reference", upstream, torch.float64, **options)
    chunks = {"weights_hint": guess, "workspace_bytes": 2 * 4 * 2 * VOCAB}
    result = logprob_outcome(model, ids, "triton", upstream, torch.float32, **options, **chunks)
    compare.assert_outcome(result, true, FLOAT32)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_logprobs_in_16_bits(dtype):
    """What storing the dense part in 16 bits changes: it is G p_v outside the ids, G a row's sum of upstream gradients."""
    model = random_model(N, VOCAB, 7).to(DEVICE).to(dtype)
    ids = torch.stack([torch.randperm(VOCAB)[:3] for _ in range(N)]).to(DEVICE)
    g = torch.randn(N, 3, device=DEVICE)
    true = logprob_outcome(model.to(torch.float64), ids, "reference", [g], torch.float64)
    result = logprob_outcome(model, ids, "triton", [g], dtype, workspace_bytes=3 * 6 * VOCAB)
    compare.assert_near(result.value.double(), true.value, FLOAT32, "value")
    exact = model.to(torch.float64)
    total = g.double().sum(-1, keepdim=True).abs()
    p = F.linear(exact.hidden, exact.weight).softmax(-1).scatter(-1, ids, 0.0)
    q = p.sum(-1, keepdim=True)
    relative, least = STORED[dtype]
    stored = total * (relative * p + least * q)
    allowed = stored @ exact.weight.abs()
    assert_within(result.grads["hidden"], true.grads["hidden"], allowed, "gradient of hidden")
    rounding = 3 * torch.finfo(dtype).eps / 2  # hint 1: weighted hidden states were rounded too
    # Every row deviates from the hint: the sums start anew, under the true weights.
    allowed = (stored + rounding * total * p).T @ exact.hidden.abs()
    assert_within(result.grads["weight"], true.grads["weight"], allowed, "gradient of weight")


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_ids_outside_under_one_upstream_gradient(backend, reduce):
    """Padding of -1 in some rows, all of one: each row then has a factor of its own, and forward's sums are still right."""
    hidden, weight = torch.randn(N, 7, device=DEVICE), torch.randn(VOCAB, 7, device=DEVICE)
    bias = torch.randn(VOCAB, device=DEVICE)
    ids = torch.randint(VOCAB, (N, 4), device=DEVICE)
    ids[1, 2:], ids[3, 0], ids[4] = -1, -1, -1

    def gradients(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden.clone(), weight.clone(), bias.clone())]
        logprobs, _, _ = logprobs_and_outside(leaves[0], topd.Head(leaves[1], leaves[2]), ids, padded=True, backend=name)
        assert logprobs.isneginf().equal(ids == -1)
        getattr(logprobs, reduce)().backward()
        return tuple(leaf.grad for leaf in leaves)

    for name, result, true in zip(
        TENSORS, gradients(backend, torch.float32), gradients("reference", torch.float64), strict=False
    ):
        compare.assert_near(result.double(), true, FLOAT32, name)
        assert result.any()


@pytest.mark.parametrize("uniform", [True, False], ids=["sum", "weights"])
def test_soft_targets(uniform):
    """Repeats, padding, and a row with one target, masked rows among them."""
    hidden, weight = 2 * torch.randn(N, 7, device=DEVICE), torch.randn(VOCAB, 7, device=DEVICE)
    ids = torch.randint(VOCAB, (N, 4), device=DEVICE)
    ids[:, 2] = ids[:, 0]
    probs = torch.rand(N, 4, device=DEVICE) + 0.1
    probs[1, 1:], probs[3, 3] = 0, 0
    ids[1, 1:] = 10**9
    options = {"normalize": True, "temperature": 1.3, "mask": None if uniform else torch.arange(N, device=DEVICE) != 4}
    upstream = torch.ones(N, device=DEVICE) if uniform else torch.randn(N, device=DEVICE)

    def outcome(name: str, dtype: torch.dtype) -> Outcome:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden.clone(), weight.clone())]
        value = topd.soft_target_kl(leaves[0], topd.Head(leaves[1]), ids, probs.to(dtype), **options, backend=name)
        value.backward(upstream.to(dtype))
        return Outcome(value.detach(), dict(zip(TENSORS, (leaf.grad for leaf in leaves), strict=False)))

    compare.assert_outcome(outcome("triton", torch.float32), outcome("reference", torch.float64), FLOAT32)
