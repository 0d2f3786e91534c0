"""The math of a row is written three times, in torch, C++ and Triton: the numbers that the three share are the same.

Series and cut-offs are read from the sources. The two Python files are run on polynomials in place of tensors, so that what is
compared are the coefficients, however they are written. What differs by dtype or method, and why:

- phi(d) = exp(-d) + d - 1. In torch it is the Taylor series up to a cut-off that depends on the dtype, expm1(-d) + d beyond,
  since torch has an expm1. C++ and Triton have none that is vectorised: they take one series for all |d| <= 1, in float32 with
  fitted coefficients, in float64 with those of Taylor.
- log1p, expm1 and tanh: torch's own, and those of at::vec in C++; Triton has none, so these are here alone, and are pinned to
  their definitions.
- log(1 + u) between -1/2 and 0 has a fitted series in float32, kappa: C++ takes it for the JSD at beta = 1/2, Triton for every
  mixture. It is pinned to what it stands for; C++'s logarithm in float32 by tests/ops/test_divergence_rows.py.
"""

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = ROOT / "python_api" / "topd" / "ops" / "shared" / "row_math.py"
TRITON = ROOT / "topd_kernels" / "shared" / "row_math.py"


def native(name: str) -> str:
    """Return the text of a file of csrc, wherever it stands."""
    (path,) = (ROOT / "csrc").rglob(name)
    return path.read_text()


def texts(folder: Path, suffixes: tuple[str, ...]) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*")) if path.suffix in suffixes)


class Cut:
    """A comparison with a number, the number noted."""

    def __invert__(self) -> "Cut":
        return self


class Polynomial:
    """Powers of one variable with their coefficients, in place of a tensor; what it is compared with is in `cuts`."""

    def __init__(self, coefficients: dict[int, float], dtype: object, cuts: list[float]) -> None:
        self.coefficients = {power: value for power, value in coefficients.items() if value}
        self.dtype, self.cuts = dtype, cuts

    def of(self, coefficients: dict[int, float]) -> "Polynomial":
        return Polynomial(coefficients, self.dtype, self.cuts)

    def __add__(self, other: Any) -> "Polynomial":
        added = other.coefficients if isinstance(other, Polynomial) else {0: other}
        return self.of({p: self.coefficients.get(p, 0.0) + added.get(p, 0.0) for p in {*self.coefficients, *added}})

    def __mul__(self, other: Any) -> "Polynomial":
        factors = other.coefficients if isinstance(other, Polynomial) else {0: other}
        product: dict[int, float] = {}
        for p, a in self.coefficients.items():
            for q, b in factors.items():
                product[p + q] = product.get(p + q, 0.0) + a * b
        return self.of(product)

    def __truediv__(self, other: Any) -> "Polynomial":
        """By a number; by a polynomial the quotient is a variable of its own."""
        return self.of({1: 1.0}) if isinstance(other, Polynomial) else self * (1 / other)

    def __neg__(self) -> "Polynomial":
        return self * -1.0

    def __sub__(self, other: Any) -> "Polynomial":
        return self + -other

    def __rsub__(self, other: float) -> "Polynomial":
        return -self + other

    def __le__(self, number: float) -> Cut:
        self.cuts.append(number)
        return Cut()

    def abs(self) -> "Polynomial":
        return self

    def masked_fill(self, _mask: Cut, _value: float) -> "Polynomial":
        return self

    __lt__, __radd__, __rmul__ = __le__, __add__, __mul__


class Constexpr(float):
    """A number that Triton knows when it compiles, and whose `value` Python reads."""

    @property
    def value(self) -> float:
        return float(self)


def first_branch(_cut: Cut, taken: Polynomial, _other: Polynomial) -> Polynomial:
    return taken


def elsewhere(x: Polynomial) -> Polynomial:
    """Stand for exp, log and expm1, which are in the branches beyond a cut."""
    return x


def functions(path: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a file's constants and functions, without its imports and classes, in a namespace that stands for torch or Triton."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.Assign))]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list = None, []
            for argument in node.args.args:
                argument.annotation = None
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace


def in_torch(dtype: torch.dtype) -> tuple[dict[int, float], list[float]]:
    """Return the coefficients of torch's phi and its cut-off."""
    stub = SimpleNamespace(float32=torch.float32, float64=torch.float64, where=first_branch, expm1=elsewhere)
    x = Polynomial({1: 1.0}, dtype, [])
    return functions(TORCH, {"torch": stub})["phi"](x).coefficients, x.cuts


def in_triton(name: str, dtype: torch.dtype) -> tuple[Any, list[float]]:
    """Return what a function of Triton's row math makes of a variable, and the numbers that it compares with."""
    stub = SimpleNamespace(float32=torch.float32, float64=torch.float64, where=first_branch, abs=elsewhere, constexpr=Constexpr)
    stub.exp = stub.log = elsewhere
    x = Polynomial({1: 1.0}, dtype, [])

    def minimum(value: Polynomial, number: float) -> Polynomial:
        x.cuts.append(number)
        return value

    stub.minimum = minimum
    return functions(TRITON, {"tl": stub})[name](x), x.cuts


def native_series(name: str) -> list[float]:
    (numbers,) = re.findall(rf"std::array<float, \d+> {name}{{([^}}]*)}}", native("row_math.h"))
    return [float(number.strip().rstrip("f")) for number in numbers.split(",")]


def rounded(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def test_phi_in_float32_has_one_series_in_cpp_and_triton():
    """The same fitted numbers, term by term: phi(d) is the even half minus d times the odd one, phi(-d) their sum."""
    even, odd = native_series("kEven")[::-1], native_series("kOdd")[::-1]
    assert (len(even), len(odd)) == (4, 4)
    (plus, minus), _ = in_triton("phi_pair", torch.float32)
    halves = {2 + 2 * k: a for k, a in enumerate(even)} | {3 + 2 * k: a for k, a in enumerate(odd)}
    assert {p: rounded(a) for p, a in minus.coefficients.items()} == {p: rounded(a) for p, a in halves.items()}
    assert plus.coefficients == {p: a * (-1) ** p for p, a in minus.coefficients.items()}
    d = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    value = sum(a * d**p for p, a in plus.coefficients.items())
    phi = torch.expm1(-d) + d
    assert ((value - phi).abs() <= 1e-8 * phi + 1e-16).all()


def test_phi_in_float64_is_taylors_series_in_cpp_and_triton():
    """The powers 2 to 19, each with 1 / n!: what is left out is 1 / 20! = 4e-19."""
    (plus, minus), _ = in_triton("phi_pair", torch.float64)
    assert minus.coefficients == pytest.approx({n: 1 / math.factorial(n) for n in range(2, 20)}, rel=1e-15)
    assert plus.coefficients == {n: a * (-1) ** n for n, a in minus.coefficients.items()}
    text = native("row_math.h")
    assert re.search(r"kEven = make\(2\), kOdd = make\(3\)", text)
    (terms,) = re.findall(r"std::array<T, (\d+)> make\(int first\)", text)
    assert len(minus.coefficients) == 2 * int(terms)
    assert "factorial *= k" in text
    assert "static_cast<T>(1 / factorial)" in text


@pytest.mark.parametrize(("dtype", "cut"), [(torch.float32, 0.25), (torch.float64, 0.01)], ids=str)
def test_torchs_phi_is_taylors_series_up_to_a_cut_where_it_is_exact(dtype, cut):
    """The first power left out is below the dtype's rounding at the cut, and expm1(-d) + d keeps the digits that remain."""
    coefficients, cuts = in_torch(dtype)
    assert cuts == [cut]
    assert coefficients == pytest.approx({n: (-1) ** n / math.factorial(n) for n in range(2, 8)}, rel=1e-15)
    assert cut**8 / math.factorial(8) / (cut**2 / 2) < torch.finfo(dtype).eps / 2


def test_tritons_expm1_and_tanh_stay_in_the_range_of_phi():
    for dtype in (torch.float32, torch.float64):
        expm1, cuts = in_triton("expm1", dtype)
        (_, minus), _ = in_triton("phi_pair", dtype)
        assert cuts == [1]
        assert expm1.coefficients == minus.coefficients | {1: 1.0}
        _, cuts = in_triton("tanh", dtype)
        assert set(cuts) == {1, 0.5, 0}  # of expm1, of tanh and of the sign; expm1 gets 2 |x| <= 1


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, 17), (torch.float64, 37)], ids=str)
def test_tritons_log1p_is_the_series_of_atanh(dtype, last):
    """log(1 + x) = 2 atanh(s), s = x / (2 + x), for |x| <= 1/2, where |s| <= 1/3: the first power left out is too small."""
    series, cuts = in_triton("log1p", dtype)
    assert cuts == [0.5]
    assert series.coefficients == pytest.approx({n: 2 / n for n in range(1, last + 1, 2)}, rel=1e-15)
    assert (1 / 3) ** (last + 1) / (last + 2) < torch.finfo(dtype).eps / 2


def test_kappa_of_the_even_mixture_is_what_it_stands_for():
    """log(1 + u) = u + u^2 kappa(u) on [-1/2, 0], fitted to 5e-9; near 0, where the quotient has no digits, by its limit."""
    u = torch.linspace(-0.5, -1e-3, 1000, dtype=torch.float64)
    value = torch.zeros_like(u)
    for coefficient in native_series("kKappa"):
        value = value * u + coefficient
    kappa = (torch.log1p(u) - u) / u**2
    assert (value - kappa).abs().max() <= 1e-8
    assert native_series("kKappa")[-1] == pytest.approx(-0.5, abs=5e-9)


def test_kappa_has_one_series_in_cpp_and_triton():
    kappa, _ = in_triton("kappa", torch.float32)
    rising = native_series("kKappa")[::-1]
    assert [rounded(kappa.coefficients[power]) for power in range(len(kappa.coefficients))] == list(map(rounded, rising))


def numbers(text: str, pattern: str, **names: float) -> set[float]:
    """Return every number that a pattern finds, which must find one; a name stands for its value."""
    matches = re.findall(pattern, text)
    assert matches, pattern
    return {names[each] if each in names else float(each) for each in matches}


def test_a_term_has_one_form_up_to_a_log_ratio_of_one_and_another_beyond():
    """p phi(d) where |d| <= 1, q - p + p d elsewhere."""
    kernels, csrc = texts(ROOT / "topd_kernels", (".py",)), texts(ROOT / "csrc", (".h", ".cpp"))
    assert numbers(TORCH.read_text(), r"\bd\.abs\(\) <= ([\d.]+)") == {1}
    assert numbers(csrc, r"at_most\((?:\w+\.)?d\.abs\(\), Vec<T>\(([\d.]+)\)\)") == {1}
    assert numbers(kernels, r"near = tl\.abs\(d\) <= ([\d.]+)") == {1}


def test_logits_are_subtracted_as_they_are_where_their_offsets_are_within_four():
    kernels, csrc = texts(ROOT / "topd_kernels", (".py",)), texts(ROOT / "csrc", (".h", ".cpp"))
    assert numbers(TORCH.read_text(), r"shift\.abs\(\) <= ([\d.]+)") == {4}
    assert numbers(csrc, r"std::abs\(t\.top - s\.top\) <= ([\d.]+)") == {4}
    constants = numbers(kernels, r"NEAR_OFFSETS = tl\.constexpr\(([\d.]+)\)") if "NEAR_OFFSETS =" in kernels else {4}
    assert constants == {4}
    assert numbers(kernels, r"near = tl\.abs\((?:shift|\w*ys\w* - \w*yt\w*)\) <= ([\w.]+)", NEAR_OFFSETS=4) == {4}


def test_the_share_of_a_mixture_is_added_up_where_it_is_below_a_half():
    assert numbers(TORCH.read_text(), r"mild = less \* e >= ([-\d.]+)") == {-0.5}
    assert numbers(native("row_math.h"), r"mild = at_most\(Vec<T>\(([-\d.]+)\), excess\)") == {-0.5}
    assert numbers(TRITON.read_text(), r"mild = excess >= ([-\d.]+)") == {-0.5}
