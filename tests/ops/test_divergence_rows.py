"""topd::divergence_rows, the C++ kernel, on given logits: the reference in fp64, and its own elementary functions."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import DIVERGENCES

import topd
from topd.ops.linear_divergence.eager import divergence_rows
from topd.ops.linear_divergence.spec import ROWS_INPUTS, Rows, RowsInputs, RowSpec
from topd.scores import FIELDS

pytestmark = pytest.mark.cpp

KINDS = [(divergence.name, divergence.parameter) for divergence in DIVERGENCES]


def spec_of(divergence: str, parameter: float, *, plain: bool = True) -> RowSpec:
    if plain:
        return RowSpec(1.0, None, 1.0, None, 1.0, divergence, parameter, 0.0)
    return RowSpec(0.7, 20.0, 1.3, None, 1.5, divergence, parameter, 0.3)


def by_cpp(student, teacher, spec, *, student_bias=None, teacher_bias=None, tokens=None) -> Rows:
    student, teacher = student.clone(), teacher.clone()
    operands = (student, teacher, student_bias, teacher_bias, tokens)
    value, scores, finite = torch.ops.topd.divergence_rows(*operands, *spec, True, True)
    return Rows(value, scores, finite, student)


def random_logits(rows: int, student_vocab: int, teacher_vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from nearly equal to far apart, some peaked, offsets between the sides included."""
    torch.manual_seed(rows * 7919 + student_vocab)
    student = torch.randn(rows, student_vocab, dtype=torch.float64) * torch.linspace(0.1, 12, rows).unsqueeze(-1)
    teacher = torch.randn(rows, teacher_vocab, dtype=torch.float64) * 3
    vocab = min(student_vocab, teacher_vocab)
    near = torch.arange(rows) % 3 == 0
    noise = 10.0 ** -torch.arange(rows).remainder(5).unsqueeze(-1)
    teacher[near, :vocab] = (student[:, :vocab] + noise * torch.randn(rows, vocab))[near]
    return student, teacher + 40.0 * (torch.arange(rows) % 4 == 1).unsqueeze(-1)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every option"])
@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
@pytest.mark.parametrize("widths", [(1, 1), (5, 9), (33, 33), (1024, 1030), (1025, 1025), (4099, 4098)])
def test_agrees_with_the_reference_in_float64(divergence, parameter, widths, plain):
    student, teacher = random_logits(13, *widths)
    options = {}
    if not plain:
        options = {
            "student_bias": torch.randn(widths[0], dtype=torch.float64),
            "teacher_bias": torch.randn(widths[1], dtype=torch.float64),
        }
    tokens = torch.arange(13) % min(widths)
    spec = spec_of(divergence, parameter, plain=plain)
    rows = by_cpp(student, teacher, spec, tokens=tokens, **options)
    biases = (options.get("student_bias"), options.get("teacher_bias"))
    true = divergence_rows(student, teacher, *biases, tokens, spec, grad=True, scores=True)
    torch.testing.assert_close(rows.value, true.value, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(rows.scores, true.scores, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(rows.grad_logits, true.grad_logits, rtol=1e-10, atol=1e-14)
    assert torch.equal(rows.finite, true.finite)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_float32_keeps_its_digits(divergence, parameter):
    """Against fp64 on the same logits: values to 3e-6 of what they add up, gradients to 3e-6 of the row's largest plus 2 ulp of
    its largest probability (p_S - p_T from two rounded probabilities has no more). The total variation is linear where the KLs
    are quadratic: near equality it is no better than the probabilities."""
    student, teacher = (logits.float() for logits in random_logits(24, 3001, 3001))
    spec = spec_of(divergence, parameter)
    rows = by_cpp(student, teacher, spec)
    true = divergence_rows(student.double(), teacher.double(), None, None, None, spec, grad=True, scores=True)
    scale = true.value if parameter != 0.05 else true.value.abs().clamp_min(1.0)  # a clipped sum adds terms of both signs
    atol = 1e-7 if divergence == "total_variation" else 0.0
    assert ((rows.value - true.value).abs() <= 3e-6 * scale + atol).all()
    largest = true.grad_logits.abs().amax(-1, keepdim=True)
    rounding = torch.maximum(student.softmax(-1), teacher.softmax(-1)).amax(-1, keepdim=True) * 2**-22
    if divergence != "total_variation":  # its gradient jumps where the sides are equal
        assert ((rows.grad_logits - true.grad_logits).abs() <= 3e-6 * largest + rounding).all()


def test_exp_is_within_two_ulp():
    """p_S of the second of two entries, exp(x) / (1 + exp(x)), is the gradient where the teacher gives it nothing."""
    x = torch.linspace(0, -103, 20_001)
    student = torch.stack([torch.zeros_like(x), x], -1)
    teacher = torch.tensor([0.0, -torch.inf]).expand(x.numel(), 2)
    grad = by_cpp(student, teacher, spec_of("forward_kl", math.inf)).grad_logits[:, 1]
    true = torch.sigmoid(x.double())
    ulp = torch.maximum(true * 2**-23, torch.tensor(2.0**-149, dtype=torch.float64))
    assert ((grad.double() - true).abs() <= 2 * ulp).all()


def test_log_of_a_share_is_within_float32():
    """Student and teacher on different entries: the JSD is the entropy of (beta, 1 - beta), all of it logarithms of shares."""
    student, teacher = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    for beta in [*torch.logspace(-6, -0.31, 40, dtype=torch.float64).tolist(), 0.5, 0.75, 0.99, 0.999]:
        value = by_cpp(student, teacher, spec_of("jsd", beta)).value.item()
        true = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert value == pytest.approx(true, rel=1e-6)


def test_rows_with_a_stride_and_rows_without_a_distribution():
    student, teacher = (torch.randn(6, 40)[:, :37] for _ in range(2))
    expected = by_cpp(student.contiguous(), teacher.contiguous(), spec_of("reverse_kl", 0.0))
    wide = torch.zeros(6, 40)
    wide[:, :37] = student
    value, _, finite = torch.ops.topd.divergence_rows(
        wide[:, :37], teacher.clone(), None, None, None, *spec_of("reverse_kl", 0.0), True, False
    )
    assert torch.equal(value, expected.value)
    assert torch.equal(wide[:, :37], expected.grad_logits)
    assert (wide[:, 37:] == 0).all()
    assert finite.all()
    student[2, 5], teacher[4] = torch.nan, -torch.inf
    broken = by_cpp(student, teacher, spec_of("reverse_kl", 0.0))
    assert broken.finite.tolist() == [True, True, False, True, False, True]
    assert broken.value.isnan().tolist() == [False, False, True, False, True, False]
    assert broken.scores[FIELDS.index("forward_kl")].isnan().tolist() == [False, False, True, False, True, False]
    assert (broken.grad_logits[[2, 4]] == 0).all()


def test_any_number_of_threads_gives_the_same_bits():
    student, teacher = (logits.float() for logits in random_logits(64, 5000, 5000))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_cpp(student, teacher, spec_of("jsd", 0.5))
        torch.set_num_threads(2)
        two = by_cpp(student, teacher, spec_of("jsd", 0.5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_the_library_is_threaded_by_the_openmp_that_torch_ships():
    """Built without OpenMP it would run on one thread, linked with it there would be two runtimes."""
    libraries = list(Path(topd.__file__).parent.glob("_cpp_*.so"))
    assert libraries
    for library in libraries:
        content = library.read_bytes()
        assert b"GOMP_parallel" in content or b"__kmpc_fork_call" in content
        assert b"libgomp" not in content


@pytest.mark.slow
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="one build runs here, and is tested above")
def test_the_avx2_build_passes_these_tests_too():
    """And those of the rows of log-probabilities, in one process."""
    others = "agrees or digits or ulp or share or stride"
    chosen = f"({others} or test_logprob_rows) and not avx2 and not threads"
    files = [__file__, str(Path(__file__).with_name("test_logprob_rows.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    ran = subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout


def test_wrong_tiles_are_refused():
    spec = spec_of("reverse_kl", 0.0)
    with pytest.raises(ValueError, match="student_product and teacher_product must be"):
        by_cpp(torch.zeros(2, 3), torch.zeros(3, 3), spec)
    with pytest.raises(ValueError, match="share a dtype"):
        by_cpp(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), spec)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 3\), got 3"):
        by_cpp(torch.zeros(2, 3), torch.zeros(2, 4), spec, tokens=torch.tensor([0, 3]))
    products = torch.zeros(2, 3), torch.zeros(2, 3)
    for wrong, message in (
        ({"grad_tile": torch.zeros(2, 3)}, "grad_tile must be None"),
        ({"grad_scale": 2.0}, "must be 1, got 2"),
    ):
        inputs = RowsInputs(*products, None, None, None, spec, grad=True, scores=False)._replace(**wrong)
        with pytest.raises(ValueError, match=message):
            torch.ops.topd.divergence_rows(*ROWS_INPUTS.pack(inputs))
