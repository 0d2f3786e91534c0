"""topd.sampled_kl: estimates of the reverse KL from the log-probabilities of sampled tokens."""

import math

import pytest
import torch

import topd

ESTIMATORS = ("k1", "k2", "k3")
LOG2 = math.log(2)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [LOG2, -LOG2, 0]), ("k2", [LOG2**2 / 2, LOG2**2 / 2, 0]), ("k3", [1 / 2 - 1 + LOG2, 2 - 1 - LOG2, 0])],
)
def test_literal_values(estimator, expected, device):
    """p_S = (1/2, 1/4, 1/8) of tokens with p_T = (1/4, 1/2, 1/8)."""
    student, teacher = f64([1 / 2, 1 / 4, 1 / 8]).log().to(device), f64([1 / 4, 1 / 2, 1 / 8]).log().to(device)
    value = topd.sampled_kl(student, teacher, estimator=estimator)
    torch.testing.assert_close(value.cpu(), f64(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [1, 1, 1]), ("k2", [LOG2, -LOG2, 0]), ("k3", [1 - 1 / 2, 1 - 2, 0])]
)
def test_literal_gradients(estimator, expected):
    student = f64([1 / 2, 1 / 4, 1 / 8]).log().requires_grad_()
    topd.sampled_kl(student, f64([1 / 4, 1 / 2, 1 / 8]).log(), estimator=estimator).sum().backward()
    torch.testing.assert_close(student.grad, f64(expected), rtol=1e-12, atol=0)


def test_k1_without_a_clamp_is_the_default():
    student, teacher = torch.tensor([-1.0, -30.0]), torch.tensor([-21.0, -2.0])
    assert topd.sampled_kl(student, teacher).tolist() == [20, -28]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [1e-9, 1e-6, 1e-3, 0.02, 0.24, 0.26, 0.9, 5.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits(r, sign, dtype):
    """Relative error against the power series in float64; there expm1(-r) + r costs 2 / r units in the last place."""
    r = torch.tensor([sign * r], dtype=dtype).requires_grad_()
    value = topd.sampled_kl(r, torch.zeros_like(r, requires_grad=False), estimator="k3")
    value.backward()
    x = -r.item()
    true = math.fsum(x**n / math.factorial(n) for n in range(2, 160))
    slope = -math.fsum(x**n / math.factorial(n) for n in range(1, 160))
    if x < -1:  # there the series alternates, and nothing cancels in the plain formula
        true, slope = math.expm1(x) - x, -math.expm1(x)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-14
    assert value.item() == pytest.approx(true, rel=tolerance, abs=0)
    assert r.grad.item() == pytest.approx(slope, rel=tolerance, abs=0)


def test_k2_and_k3_are_never_negative():
    student, teacher = -torch.rand(10_000), -torch.rand(10_000)
    teacher[:5000] = student[:5000] + 1e-4 * torch.randn(5000)
    assert topd.sampled_kl(student, teacher, estimator="k2").min() >= 0
    assert topd.sampled_kl(student, teacher, estimator="k3").min() >= 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_clamp_holds_r_in_both_directions_and_stops_the_gradient(estimator):
    """r = 3, -3 beyond 2; 1, -1 within."""
    student, teacher = f64([-1, -7, -1, -3]).requires_grad_(), f64([-4, -4, -2, -2])
    value = topd.sampled_kl(student, teacher, estimator=estimator, clamp=2)
    value.sum().backward()
    free = f64([2, -2, 1, -1]).requires_grad_()
    expected = topd.sampled_kl(free, torch.zeros_like(free, requires_grad=False), estimator=estimator)
    expected.sum().backward()
    assert torch.equal(value, expected)
    assert student.grad[:2].tolist() == [0, 0]
    assert torch.equal(student.grad[2:], free.grad[2:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", [None, 5.0])
def test_a_token_that_the_teacher_excludes_has_no_nan(clamp, estimator):
    """Unclamped it is inf, as the KL is; clamped it is an ordinary token beyond the clamp."""
    student = torch.tensor([-1.0, -2.0]).requires_grad_()
    value = topd.sampled_kl(student, torch.tensor([-math.inf, -2.5]), estimator=estimator, clamp=clamp)
    value.sum().backward()
    assert value[0].isinf() if clamp is None else value[0].isfinite()
    assert not student.grad.isnan().any()


def tiny_vocabularies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student and log-probabilities of a teacher over 5 tokens."""
    return torch.randn(5, dtype=torch.float64).requires_grad_(), torch.randn(5, dtype=torch.float64).log_softmax(-1)


def reverse_kl(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) * (logits.log_softmax(-1) - teacher)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    """The expectation over the student's samples, all five of them enumerated."""
    logits, teacher = tiny_vocabularies()
    expectation = (logits.softmax(-1) * topd.sampled_kl(logits.log_softmax(-1), teacher, estimator=estimator)).sum()
    torch.testing.assert_close(expectation, reverse_kl(logits, teacher), rtol=1e-12, atol=0)


def test_k2s_gradient_is_the_reverse_kls():
    """Samples are fixed: the probabilities that weigh them are constants. k1's gradient is then 0, k3's the forward KL's."""
    logits, teacher = tiny_vocabularies()
    (true,) = torch.autograd.grad(reverse_kl(logits, teacher), logits)
    student_p, teacher_p = logits.softmax(-1).detach(), teacher.exp()
    expected = {"k1": torch.zeros_like(true), "k2": true, "k3": student_p - teacher_p}
    for estimator, gradient in expected.items():
        value = (student_p * topd.sampled_kl(logits.log_softmax(-1), teacher, estimator=estimator)).sum()
        (grad,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(grad, gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_the_result_has_the_wider_dtype(student, teacher, expected):
    value = topd.sampled_kl(torch.full((2, 3), -1.0, dtype=student), torch.full((2, 3), -2.0, dtype=teacher), estimator="k3")
    assert value.dtype == expected
    assert value.shape == (2, 3)
    torch.testing.assert_close(value, torch.full((2, 3), math.exp(-1), dtype=expected))


def test_no_tokens():
    student = torch.zeros(0).requires_grad_()
    value = topd.sampled_kl(student, torch.zeros(0), estimator="k3", clamp=1.0)
    value.sum().backward()
    assert value.shape == student.grad.shape == (0,)


S, T = torch.full((2,), -1.0), torch.full((2,), -2.0)
REFUSED = {
    "estimator": ((S, T), {"estimator": "k4"}, ValueError, ["estimator", "'k1'", "'k3'", "'k4'"]),
    "estimator type": ((S, T), {"estimator": 1}, ValueError, ["estimator", "1"]),
    "shapes": ((S, T[:1]), {}, ValueError, ["teacher_logprob", "[2]", "[1]", "student_logprob"]),
    "student int": ((S.long(), T), {}, TypeError, ["student_logprob", "float32", "int64"]),
    "teacher list": ((S, [-2.0, -2.0]), {}, TypeError, ["teacher_logprob", "Tensor", "list"]),
    "teacher grad": ((S, T.clone().requires_grad_()), {}, ValueError, ["teacher_logprob", "require grad", "detach()"]),
    "device": ((S, T.to("meta")), {}, ValueError, ["teacher_logprob", "meta", "cpu", "move"]),
    "clamp 0": ((S, T), {"clamp": 0}, ValueError, ["clamp", "> 0", "0", "None means no clamp"]),
    "clamp negative": ((S, T), {"clamp": -1.0}, ValueError, ["clamp", "> 0", "-1.0"]),
    "clamp nan": ((S, T), {"clamp": math.nan}, ValueError, ["clamp", "finite", "nan"]),
    "clamp type": ((S, T), {"clamp": "1"}, TypeError, ["clamp", "number", "str"]),
}


@pytest.mark.parametrize(("given", "options", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(given, options, kind, words):
    with pytest.raises(kind) as caught:
        topd.sampled_kl(*given, **options)
    assert not [word for word in words if word not in str(caught.value)], caught.value
