"""topd::bf16_addmm: products of bfloat16 with float32 out, and of float32 as two bfloat16 parts."""

import pytest
import torch

import topd
from topd.backends import multiplies_bf16

if not multiplies_bf16():
    pytest.skip("this processor has no products of bfloat16, or the extension is not here", allow_module_level=True)

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (65, 63, 513), (130, 257, 1031), (513, 70, 33), (2, 3, 20001), (33, 500, 300)]
# float32 sums of exact products, and of entries that are known to 2^-17.
EXACT, SPLIT = 2e-6, 2**-17 + 2e-6


def product(out, a, b, factors=None, beta=0.0, alpha=1.0):
    torch.ops.topd.bf16_addmm(out, a, b, factors, beta, alpha)
    return out


def transposed(x):
    """The same numbers, contiguous along the other dimension."""
    return x.T.contiguous().T


def operands(shape, *, wide, a_transposed=False, b_transposed=False):
    torch.manual_seed(0)
    m, n, k = shape
    a, b = torch.randn(m, k), torch.randn(k, n).bfloat16()
    a = a if wide else a.bfloat16()
    return transposed(a) if a_transposed else a, transposed(b) if b_transposed else b


def assert_near(out, true, magnitude, bound):
    """Each entry within bound of the truth, in units of the sum of its terms' magnitudes."""
    assert ((out.double() - true).abs() <= bound * magnitude + 1e-30).all()


def test_a_product_by_hand():
    a, b = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[3.0, -1.0], [0.5, 4.0]]).bfloat16()
    assert product(torch.empty(1, 2), a, b).tolist() == [[4.0, 7.0]]
    assert product(torch.ones(1, 2), a.float(), b, torch.tensor([2.0, -1.0]), beta=0.5, alpha=10.0).tolist() == [[50.5, -99.5]]


@pytest.mark.parametrize("b_transposed", [False, True], ids=["b by rows", "b by columns"])
@pytest.mark.parametrize("a_kind", ["bfloat16", "float32", "float32 by columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, a_kind, b_transposed):
    wide = a_kind != "bfloat16"
    a, b = operands(shape, wide=wide, a_transposed=a_kind.endswith("columns"), b_transposed=b_transposed)
    true, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert_near(product(torch.empty(shape[:2]), a, b), true, magnitude, SPLIT if wide else EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_beta_and_alpha(shape):
    a, b = operands(shape, wide=True, a_transposed=True)
    factors, before = torch.randn(shape[2]), torch.randn(shape[:2])
    out = product(before.clone(), a, b, factors, beta=0.5, alpha=-2.5)
    weighted = -2.5 * a.double() * factors.double()
    magnitude = 0.5 * before.double().abs() + weighted.abs() @ b.double().abs()
    assert_near(out, 0.5 * before.double() + weighted @ b.double(), magnitude, SPLIT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_out_in_bfloat16_is_the_float32_one_rounded(shape):
    a, b = operands(shape, wide=True)
    out = torch.full((shape[0], shape[1] + 3), 7.0).bfloat16()
    product(out[:, : shape[1]], a, b)
    assert torch.equal(out[:, : shape[1]], product(torch.empty(shape[:2]), a, b).bfloat16())
    assert (out[:, shape[1] :] == 7).all()


def test_strided_operands_and_out():
    a, b = operands((40, 50, 60), wide=True)
    big_a, big_b, big_out = torch.randn(40, 71), torch.randn(60, 53).bfloat16(), torch.zeros(40, 55)
    big_a[:, 5:65], big_b[:, 1:51] = a, b
    product(big_out[:, 2:52], big_a[:, 5:65], big_b[:, 1:51])
    assert torch.equal(big_out[:, 2:52], product(torch.empty(40, 50), a, b))
    assert not big_out[:, :2].any()
    assert not big_out[:, 52:].any()


def test_what_is_not_finite_stays_as_it_is():
    b = torch.eye(4).bfloat16()
    values = torch.tensor([[torch.inf, 1.0, 2.0, 3.0], [1.0, -torch.inf, 0.0, 0.0], [torch.nan, 0.0, 1.0, 0.0]])
    expected = values.double() @ b.double()  # inf times 0 is NaN, as in every product
    assert torch.equal(product(torch.empty(3, 4), values, b).double().nan_to_num(9e9), expected.nan_to_num(9e9))


def test_the_largest_float32_becomes_infinite():
    """Beyond bfloat16's largest number there is no bfloat16: such an entry is inf, as a cast makes it."""
    assert product(torch.empty(1, 1), torch.tensor([[3.4e38]]), torch.ones(1, 1).bfloat16()).item() == torch.inf


def test_no_depth_and_no_entries():
    assert product(torch.full((2, 3), 5.0), torch.randn(2, 0), torch.randn(0, 3).bfloat16()).tolist() == [[0.0] * 3] * 2
    assert product(torch.ones(2, 3), torch.randn(2, 0), torch.randn(0, 3).bfloat16(), beta=1.0).tolist() == [[1.0] * 3] * 2
    assert product(torch.empty(0, 3), torch.randn(0, 4), torch.randn(4, 3).bfloat16()).shape == (0, 3)


def test_the_same_bits_on_any_number_of_threads():
    a, b = operands((96, 130, 9000), wide=True)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(product(torch.empty(96, 130), a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(4, 3)}, "b must be bfloat16"),
        ({"a": torch.ones(2, 5)}, r"out, a and b must be \[M, N\], \[M, K\] and \[K, N\]"),
        ({"factors": torch.ones(3)}, r"factors must be float32 \[K\]"),
        (
            {"a": torch.ones(2, 4).bfloat16(), "alpha": 2.0},
            "a in bfloat16 must be contiguous along K, without factors and alpha",
        ),
        ({"out": torch.empty(2, 3).bfloat16(), "beta": 1.0}, "out must be float32, or bfloat16 with beta 0"),
        ({"out": torch.empty(3, 2).T}, r"out must be \[M, N\], contiguous along N"),
    ],
)
def test_refused(change, message):
    arguments = {"out": torch.empty(2, 3), "a": torch.ones(2, 4), "b": torch.ones(4, 3).bfloat16()} | change
    with pytest.raises(ValueError, match=message):
        product(**arguments)


def test_a_head_in_bfloat16_is_not_widened():
    """Peak memory of a call of few rows stays far below one float32 copy of a head."""
    torch.manual_seed(0)
    vocab, width = 20_000, 512
    hidden = torch.randn(8, width).bfloat16()
    student, teacher = (topd.Head(torch.randn(vocab, width).bfloat16()) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        topd.linear_divergence(hidden, student, hidden, teacher, backend="cpp")
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert largest < vocab * width  # a quarter of a float32 copy's bytes


@pytest.mark.parametrize("kind", ["rows apart", "columns apart", "one row repeated", "transposed"])
def test_heads_and_states_that_are_no_plain_matrix(kind):
    """Views of any strides give the numbers of their copies."""
    torch.manual_seed(0)
    views = {
        "rows apart": lambda n, h: torch.randn(2 * n, h).bfloat16()[::2],
        "columns apart": lambda n, h: torch.randn(n, 2 * h).bfloat16()[:, ::2],
        "one row repeated": lambda n, h: torch.randn(1, h).bfloat16().expand(n, h),
        "transposed": lambda n, h: torch.randn(h, n).bfloat16().T,
    }
    hidden, weight, teacher = views[kind](5, 6), views[kind](40, 6), views[kind](40, 6)
    grads = []
    for copy in (False, True):
        states, head, other = (each.contiguous() if copy else each.detach() for each in (hidden, weight, teacher))
        states.requires_grad_(), head.requires_grad_()
        value = topd.linear_divergence(states, topd.Head(head), states.detach(), topd.Head(other), backend="cpp")
        grads.append((value, *torch.autograd.grad(value, (states, head), torch.linspace(-1, 2, 5))))
    for viewed, copied in zip(*grads, strict=True):
        assert torch.equal(viewed, copied)
