"""topd::logprob_rows, the C++ kernel, on given logits: the reference in float64."""

import pytest
import torch
from torch import Tensor

from topd.ops.linear_logprobs.eager import logprob_rows
from topd.ops.linear_logprobs.spec import LogprobRows, LogprobSpec

pytestmark = pytest.mark.cpp
PLAIN, OPTIONS = LogprobSpec(1.0, None, 1.0), LogprobSpec(0.7, 20.0, 1.3)
WIDTHS = (1, 5, 33, 1024, 1025, 4099)
ROWS = 13


def by_cpp(
    product: Tensor,
    ids: Tensor,
    spec: LogprobSpec = PLAIN,
    *,
    bias: Tensor | None = None,
    grad: bool = True,
    entropy: bool = True,
) -> LogprobRows:
    tile = product.clone()
    second = torch.full_like(tile, torch.nan) if grad and entropy else None
    rows = torch.ops.topd.logprob_rows(tile, bias, ids, *spec, second, grad, entropy)
    return LogprobRows(*rows, tile if grad else None, second)


def random_case(width: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows from flat to peaked, at several offsets, and ids with repeats, among them the largest entry and no token."""
    torch.manual_seed(width * 101 + count)
    logits = torch.randn(ROWS, width, dtype=torch.float64) * torch.linspace(0.1, 9, ROWS).unsqueeze(-1)
    logits += 40.0 * (torch.arange(ROWS) % 4 == 1).unsqueeze(-1)
    ids = torch.randint(width, (ROWS, count))
    ids[::3, :1] = logits.argmax(-1, keepdim=True)[::3]
    ids[1::3, -1:] = ids[1::3, :1]
    ids[2::5, :1] = -1
    return logits, ids


def assert_same_rows(rows: LogprobRows, true: LogprobRows, rtol: float, grad_rtol: float) -> None:
    for name in ("logprobs", "entropy", "outside", "slope"):
        torch.testing.assert_close(getattr(rows, name), getattr(true, name), rtol=rtol, atol=1e-14, msg=name)
    for name in ("outside_grad", "entropy_grad"):
        torch.testing.assert_close(getattr(rows, name), getattr(true, name), rtol=grad_rtol, atol=1e-14, msg=name)
    assert torch.equal(rows.first, true.first)
    assert torch.equal(rows.finite, true.finite)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every option"])
@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_agrees_with_the_reference_in_float64(width, count, plain, entropy):
    logits, ids = random_case(width, count)
    spec, bias = (PLAIN, None) if plain else (OPTIONS, torch.randn(width, dtype=torch.float64))
    rows = by_cpp(logits, ids, spec, bias=bias, entropy=entropy)
    assert_same_rows(rows, logprob_rows(logits, bias, ids, spec, grad=True, entropy=entropy), 1e-11, 1e-10)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_agrees_with_plain_torch_in_float64(width, count):
    """log_softmax, gather, entropy; the mass outside by its own log-sum-exp."""
    logits, ids = random_case(width, count)
    rows, logprobs, known = by_cpp(logits, ids), logits.log_softmax(-1), ids >= 0
    chosen = logprobs.gather(-1, ids.clamp(min=0)).masked_fill(~known, -torch.inf)
    torch.testing.assert_close(rows.logprobs, chosen, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(rows.entropy, -(logprobs.exp() * logprobs).sum(-1), rtol=1e-11, atol=1e-13)
    taken = torch.zeros(ROWS, width + 1, dtype=torch.bool).scatter(-1, torch.where(known, ids, width), True)[:, :width]
    rest = logprobs.masked_fill(taken, -torch.inf)
    torch.testing.assert_close(rows.outside, rest.logsumexp(-1), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(rows.outside_grad, rest.softmax(-1).nan_to_num(0.0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_keeps_its_digits(width, count):
    """Against float64 on the same logits: log-probabilities and entropies to 3e-6 of themselves, the mass outside to 3e-6 of
    itself (its logarithm absolutely), gradients to 3e-6 of their row's largest."""
    logits, ids = random_case(width, count)
    logits = logits.float()
    rows = by_cpp(logits, ids)
    true = logprob_rows(logits.double(), None, ids, PLAIN, grad=True, entropy=True)
    for name, atol in (("logprobs", 0), ("entropy", 0), ("outside", 3e-6)):
        torch.testing.assert_close(getattr(rows, name).double(), getattr(true, name), rtol=3e-6, atol=atol, msg=name)
    for name in ("outside_grad", "entropy_grad"):
        value, expected = getattr(rows, name), getattr(true, name)
        assert ((value - expected).abs() <= 3e-6 * expected.abs().amax(-1, keepdim=True)).all(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_float32_with_every_option(width):
    """Logits of up to 15, of which float32 knows 1e-6."""
    logits, ids = random_case(width, 7)
    logits, bias = logits.float(), torch.randn(width)
    rows = by_cpp(logits, ids, OPTIONS, bias=bias)
    true = logprob_rows(logits.double(), bias.double(), ids, OPTIONS, grad=True, entropy=True)
    for name in ("logprobs", "entropy", "outside", "slope", "outside_grad", "entropy_grad"):
        torch.testing.assert_close(getattr(rows, name).double(), getattr(true, name), rtol=3e-6, atol=3e-6, msg=name)


def test_no_token_has_no_effect():
    """Ids of -1 among others change nothing about the rest, to the bit."""
    logits, ids = torch.randn(ROWS, 300), torch.randint(300, (ROWS, 4))
    none = torch.full_like(ids[:, :1], -1)
    alone, padded = by_cpp(logits, ids), by_cpp(logits, torch.cat([none, ids[:, :2], none, ids[:, 2:]], -1))
    kept = [1, 2, 4, 5]
    assert padded.logprobs[:, [0, 3]].isneginf().all()
    assert not padded.first[:, [0, 3]].any()
    assert torch.equal(padded.logprobs[:, kept], alone.logprobs)
    assert torch.equal(padded.first[:, kept], alone.first)
    for name in ("entropy", "outside", "outside_grad", "entropy_grad"):
        assert torch.equal(getattr(padded, name), getattr(alone, name)), name


def test_an_id_is_first_once_a_row():
    rows = by_cpp(torch.randn(2, 5), torch.tensor([[3, 3, 0, 3, -1, 5], [0, 1, 0, 1, 2, 2]]))
    assert rows.first.tolist() == [[True, False, True, False, False, False], [True, True, False, False, True, False]]
    assert rows.logprobs[0].isneginf().tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_what_is_not_asked_for_is_empty_and_what_is_keeps_its_bits(softcap):
    logits, ids = random_case(1025, 7)
    spec = LogprobSpec(1.0, softcap, 1.0)
    full, value = by_cpp(logits, ids, spec), by_cpp(logits, ids, spec, grad=False, entropy=False)
    assert value.entropy.shape == (0,)
    assert value.slope.shape == (0 if softcap is None else ROWS, 7)
    assert torch.equal(value.logprobs, full.logprobs)
    assert torch.equal(value.outside, full.outside)
    assert torch.equal(by_cpp(logits, ids, spec, grad=False).entropy, full.entropy)
    assert torch.equal(by_cpp(logits, ids, spec, entropy=False).outside_grad, full.outside_grad)


def test_rows_with_a_stride_and_rows_without_a_distribution():
    logits, ids = torch.randn(6, 37), torch.randint(37, (6, 3))
    expected = by_cpp(logits, ids)
    wide, second = torch.zeros(6, 40), torch.zeros(6, 50)
    wide[:, :37] = logits
    rows = torch.ops.topd.logprob_rows(wide[:, :37], None, ids, *PLAIN, second[:, :37], True, True)
    assert all(torch.equal(a, b) for a, b in zip(rows, expected[:6], strict=True))
    assert torch.equal(wide[:, :37], expected.outside_grad)
    assert torch.equal(second[:, :37], expected.entropy_grad)
    assert not wide[:, 37:].any()
    assert not second[:, 37:].any()
    logits[1, ids[1, 0]], logits[2, 5], logits[3, 7], logits[4] = torch.nan, torch.nan, torch.inf, -torch.inf
    broken = by_cpp(logits, ids)
    assert broken.finite.tolist() == [True, False, False, False, False, True]
    for value in (broken.logprobs[:, 0], broken.entropy, broken.outside):
        assert value.isnan().tolist() == [False, True, True, True, True, False]
    assert not broken.outside_grad[1:5].any()
    assert not broken.entropy_grad[1:5].any()


def test_any_number_of_threads_gives_the_same_bits():
    logits, ids = torch.randn(64, 5000) * 3, torch.randint(5000, (64, 9))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_cpp(logits, ids, OPTIONS)
        torch.set_num_threads(2)
        two = by_cpp(logits, ids, OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_wrong_tiles_are_refused():
    tile, ids = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)

    def call(product=tile, bias=None, ids=ids, second=None):
        torch.ops.topd.logprob_rows(product, bias, ids, *PLAIN, second, True, True)

    for product in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(3, 2).T):
        with pytest.raises(ValueError, match="product must be"):
            call(product)
    for wrong in (ids.int(), ids[:1], ids[:, 0]):
        with pytest.raises(ValueError, match="ids must be int64"):
            call(ids=wrong)
    for second in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).T):
        with pytest.raises(ValueError, match="entropy_tile must be like product"):
            call(second=second)
    for bias in (torch.zeros(2), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="bias"):
            call(bias=bias)
    for wrong, message in (((tile.clone(), 1.0), "grad_tile must be None"), ((None, 2.0), "must be 1, got 2")):
        with pytest.raises(ValueError, match=message):
            torch.ops.topd.logprob_rows(tile, None, ids, *PLAIN, None, True, False, *wrong)
    with pytest.raises((NotImplementedError, RuntimeError), match="Half"):
        call(tile.half())
