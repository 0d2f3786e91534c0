"""topd::divergence_rows, the Triton kernels, on given tiles: the reference in float64, and eager torch's float32."""

import math

import pytest
import torch
from triton_cases import (
    KINDS,
    NEEDS_TRITON,
    assert_divergence,
    divergence_by_triton,
    divergence_truth,
    random_logits,
    rounded,
    spec_of,
)

from tools import variants
from topd import divergences
from topd.ops.linear_divergence.spec import Rows
from topd.scores import FIELDS

pytestmark = NEEDS_TRITON
INF, NAN = math.inf, math.nan
REVERSE, FORWARD, JSD = spec_of("reverse_kl"), spec_of("forward_kl", INF), spec_of("jsd", 0.5)
BY_NAME = {"reverse_kl": REVERSE, "jsd": JSD}


def test_every_divergence_is_among_the_kinds():
    """Those of the tests here, and those whose binaries are compiled ahead of time."""
    assert {name for name, _ in KINDS} == {name for name, _ in variants.DIVERGENCES} == set(divergences.BY_NAME)


def assert_same(result: Rows, expected: Rows) -> None:
    for name, a, b in zip(Rows._fields, result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_each_divergence(divergence, parameter, dtype):
    """Rows near and far, peaked, offsets apart; more than one block in float64."""
    student, teacher = random_logits(4, 700, 700, dtype)
    spec = spec_of(divergence, parameter)
    assert_divergence(divergence_by_triton(student, teacher, spec), student, teacher, spec)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_each_divergence_with_every_option(divergence, parameter):
    """Temperature, scale of either sign, softcap, bias, tokens (two of them outside the vocabulary), unequal vocabularies."""
    widths = (23, 13) if KINDS.index((divergence, parameter)) % 2 else (13, 23)
    student, teacher = random_logits(4, *widths)
    options = {
        "student_bias": torch.randn(widths[0], dtype=torch.float64),
        "teacher_bias": torch.randn(widths[1], dtype=torch.float64),
        "tokens": torch.tensor([4, 12, 13, -1]),
    }
    numbers = {"student_scale": -0.7, "student_softcap": 6.0, "teacher_scale": 1.3, "temperature": 1.5, "hard_weight": 0.4}
    spec = spec_of(divergence, parameter, **numbers)
    result = divergence_by_triton(student, teacher, spec, **options)
    assert_divergence(result, student, teacher, spec, **options)
    assert result.value.isinf().tolist() == [False, False, True, True]
    assert result.scores[FIELDS.index("student_logprob")].isneginf().tolist() == [False, False, True, True]
    assert not result.grad_logits[:, 13:].any()
    assert result.grad_logits[:, :13].all()


@pytest.mark.parametrize(("rows", "spec"), [(1, REVERSE), (7, JSD), (130, FORWARD)], ids=["1", "7", "130"])
def test_numbers_of_rows(rows, spec):
    """130 are more than a program of the row constants takes."""
    student, teacher = random_logits(rows, 3, 3)
    result = divergence_by_triton(student, teacher, spec, scores=False, grad="in place" if rows < 130 else None)
    assert result.scores.shape == (0, rows)
    assert_divergence(result, student, teacher, spec)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("widths", [(1, 1), (13, 13), (4099, 4098)], ids=str)
def test_widths(widths, name):
    student, teacher = random_logits(2, *widths, torch.float32)
    assert_divergence(divergence_by_triton(student, teacher, BY_NAME[name]), student, teacher, BY_NAME[name])


@pytest.mark.parametrize("grad", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_the_gradient_in_a_tile_of_its_own_is_the_rounded_one(name, grad):
    """Every entry of it is written, those beyond the common vocabulary with 0, and the student's tile is left alone."""
    student, teacher = random_logits(2, 300, 200, torch.float32)
    inside = divergence_by_triton(student, teacher, BY_NAME[name], scores=False)
    apart = divergence_by_triton(student, teacher, BY_NAME[name], grad=grad, scores=False)
    expected = None if grad is None else rounded(inside.grad_logits, grad)
    assert (apart.grad_logits is None) == (grad is None)
    assert_same(Rows(*apart[:3], None), Rows(*inside[:3], None))
    if grad is not None:
        assert torch.equal(apart.grad_logits, expected)
        assert apart.grad_logits[:, :200].any()
        assert not apart.grad_logits[:, 200:].any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("splits", [3, 7])
def test_programs_that_share_a_row(splits, name):
    """Three blocks of the statistics: of seven programs four have nothing to do. Near sides, far ones, a largest entry in each
    part, a part without probability; two runs give the same bits."""
    student, teacher = random_logits(3, 1100, 1105)
    student[torch.arange(3), torch.tensor([3, 600, 1090])] += 9
    teacher[1, :520] = student[1, :520] = -INF  # a whole part without probability
    spec = spec_of(name, INF if name == "forward_kl" else 0.5)._replace(hard_weight=0.3)
    options = {"tokens": torch.tensor([0, 600, 1099]), "splits": splits, "scores": name == "forward_kl"}
    result = divergence_by_triton(student, teacher, spec, **options)
    assert_divergence(result, student, teacher, spec, tokens=options["tokens"])
    if (splits, name) == (3, "reverse_kl"):
        assert_same(divergence_by_triton(student, teacher, spec, **options), result)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_near_equal_and_certain_rows_keep_their_digits(divergence, parameter):
    """A KL of 1e-9; p = 1 - 1e-9 on both sides, and on one; logits of 1e4; a teacher 100 above the student."""
    student = 2 * torch.randn(6, 90)
    teacher = student + 4e-5 * torch.randn(6, 90)
    student[1, 7] = teacher[1, 7] = student[2, 7] = 30.0
    teacher[1, 7] += 0.5
    student[3] *= 3e3
    teacher[3] = student[3] + torch.randn(90)
    teacher[4] = 2 * torch.randn(90) + 100
    teacher[5] += 1e4
    student[5] += 1e4
    spec = spec_of(divergence, parameter)
    result = divergence_by_triton(student, teacher, spec)
    assert_divergence(result, student, teacher, spec)
    assert (result.value >= 0).all() or parameter == 0.05
    true = divergence_truth(student, teacher, spec)
    if divergence != "total_variation":
        assert 0 < true.value[0] < 3e-9
        assert result.value[0].item() == pytest.approx(true.value[0].item(), rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 3.9, 10.0, 15.0, 17.0, 100.0])
def test_offsets_leave_the_gradient_of_the_reverse_kl_its_digits(offset):
    """d is 1e-2 everywhere, whatever the sides' offsets."""
    student = 3 * torch.randn(2, 300)
    teacher = student + 1e-2 * torch.randn(2, 300) + offset
    result = divergence_by_triton(student, teacher, REVERSE, scores=False)
    assert_divergence(result, student, teacher, REVERSE)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_the_gradient_where_both_sides_are_certain_keeps_its_digits(divergence, parameter):
    """p_T and p_S of one token are 1 - 1e-9; their difference, all of the forward KL's gradient to it, is that of the sums over
    the other tokens, with offsets near and apart."""
    student, teacher = torch.randn(3, 90), torch.randn(3, 90)
    student[:, 7] = 26.0
    teacher[:, 7] = torch.tensor([26.5, 24.0, 33.0])
    spec = spec_of(divergence, parameter)
    result, true = divergence_by_triton(student, teacher, spec, scores=False), divergence_truth(student, teacher, spec)
    error = (result.grad_logits.double() - true.grad_logits).norm(dim=-1) / true.grad_logits.norm(dim=-1)
    assert (error <= 2e-5).all()


@pytest.mark.parametrize(
    ("student_first", "teacher_first", "offset"),
    [(-INF, -INF, 100.0), (-20.0, -20.0, 100.0), (-30.0, -1e4, 0.0), (-1e6, -1e3, 0.0)],
    ids=["left out", "no offset", "teacher's far down", "both far down"],
)
def test_the_first_entry_is_one_of_many(student_first, teacher_first, offset):
    """A padding token that a large negative bias keeps out, say: it must not set the precision of the others."""
    student = 3 * torch.randn(2, 300)
    teacher = student + 1e-2 * torch.randn(2, 300) + offset
    student[:, 0], teacher[:, 0] = student_first, teacher_first
    result = divergence_by_triton(student, teacher, REVERSE, scores=False)
    assert_divergence(result, student, teacher, REVERSE)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_probabilities_of_zero(divergence, parameter):
    """By a bias of -inf: both sides' entry, the student's alone, the teacher's alone; one-hot sides, equal and not.

    fails for the two KLs: divergence_rows._finish makes the lost mass 0 as value * 0, which is NaN where the value is inf.
    """
    student, teacher = random_logits(5, 6, 6)
    hot = torch.tensor([0.0, *[-INF] * 5], dtype=torch.float64)
    student[3], teacher[3], student[4], teacher[4] = hot, hot, hot, hot.roll(2)
    student[0, 2] = teacher[0, 2] = student[1, 3] = teacher[2, 1] = -INF
    bias = torch.tensor([0.3, -0.2, 0.1, 0.0, -INF, 0.5], dtype=torch.float64)
    spec = spec_of(divergence, parameter, hard_weight=0.3)
    options = {"student_bias": bias, "teacher_bias": bias, "tokens": torch.tensor([0, 1, 2, 0, 0])}
    result = divergence_by_triton(student, teacher, spec, **options)
    assert_divergence(result, student, teacher, spec, **options)
    assert result.finite.all()
    assert result.grad_logits.isfinite().all()
    assert result.scores[FIELDS.index("forward_kl")].isinf().tolist() == [False, True, False, False, True]
    assert result.scores[FIELDS.index("reverse_kl")].isinf().tolist() == [False, False, True, False, True]


def test_what_an_infinite_value_leaves_of_the_gradient():
    """The forward KL's is still p_S - p_T, the reverse KL's is 0."""
    student = torch.tensor([[0.0, -INF, 0.0], [0.0, 1.0, -1.0]])
    teacher = torch.tensor([[0.0, 0.0, -1.0], [0.0, -INF, 1.0]])
    forward, reverse = (divergence_by_triton(student, teacher, spec) for spec in (FORWARD, REVERSE))
    assert forward.value.isinf().tolist() == [True, False]
    torch.testing.assert_close(forward.grad_logits, student.softmax(-1) - teacher.softmax(-1), rtol=1e-6, atol=1e-7)
    assert reverse.value.isinf().tolist() == [False, True]
    assert reverse.grad_logits[0].any()
    assert not reverse.grad_logits[1].any()


@pytest.mark.parametrize(("spec", "splits"), [(FORWARD, 1), (REVERSE, 2), (JSD, 1)], ids=["forward", "reverse, 2 parts", "jsd"])
def test_rows_without_a_distribution_stand_alone(spec, splits):
    """NaN and +inf on either side, first, last and largest; nothing but -inf."""
    vocab = 600 if splits == 2 else 9
    student, teacher = random_logits(9, vocab, vocab)
    student[1, 0] = teacher[2, -1] = NAN
    student[3, -1] = teacher[4, 0] = INF
    student[5], teacher[6] = -INF, -INF
    student[7, 3], student[7, 4] = INF, NAN
    spec, tokens = spec._replace(hard_weight=0.5), torch.arange(9)
    result = divergence_by_triton(student, teacher, spec, tokens=tokens, splits=splits, scores=splits == 1)
    assert_divergence(result, student, teacher, spec, tokens=tokens)
    kept = torch.tensor([True, *[False] * 7, True])
    assert torch.equal(result.finite, kept)
    assert result.value.isnan().tolist() == (~kept).tolist()
    assert result.scores[:, ~kept].isnan().all()
    assert result.grad_logits.any(-1).tolist() == kept.tolist()


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_equal_sides_are_exactly_equal(divergence, parameter):
    tile = torch.cat([torch.randn(1, 50) * 20, torch.zeros(1, 50)])
    result = divergence_by_triton(tile, tile, spec_of(divergence, parameter), scores=False)
    assert result.value.tolist() == [0, 0]
    assert not result.grad_logits.any()


def test_the_first_of_equal_entries_is_the_most_likely_one():
    """In other lanes, other blocks and other parts of the row."""
    student = torch.randn(4, 1100, dtype=torch.float64)
    teacher = student + torch.randn(4, 1100)
    student[:, [7, 3, 900]] = 11.0
    teacher[[0, 1, 2], [3, 7, 900]] = 9.0
    teacher[3, [3, 900]] = 9.0
    for splits in (1, 2):
        result = divergence_by_triton(student, teacher, FORWARD, grad=None, splits=splits)
        assert result.scores[FIELDS.index("top1_agreement")].tolist() == [1, 0, 0, 1]


def test_no_rows():
    result = divergence_by_triton(torch.empty(0, 5), torch.empty(0, 7), JSD, grad=torch.bfloat16)
    assert [tuple(part.shape) for part in result] == [(0,), (9, 0), (0,), (0, 5)]


def test_rows_with_a_stride():
    """Tiles that are the first rows and entries of larger ones."""
    student, teacher = random_logits(3, 40, 44)
    expected = divergence_by_triton(student[:, :37].contiguous(), teacher[:, :39].contiguous(), REVERSE)
    assert_same(divergence_by_triton(student[:, :37], teacher[:, :39], REVERSE), expected)


def test_a_row_by_hand():
    """p_S = (1/4, 3/4), p_T = (1/2, 1/2), in nats; the gradients by the formulas of the reference's docstring."""
    ln = math.log
    student, teacher = torch.tensor([[0.0, ln(3)], [5.0, 5.0]], dtype=torch.float64).split(1)
    d0, d1 = ln(2), ln(2 / 3)  # log p_T - log p_S
    reverse = -(d0 / 4 + 3 * d1 / 4)
    cases = [
        (FORWARD, (d0 + d1) / 2, (-1 / 4, 1 / 4)),
        (REVERSE, reverse, ((-d0 - reverse) / 4, 3 * (-d1 - reverse) / 4)),
        (spec_of("forward_kl", 0.2), 0.2 + d1 / 2, (1 / 4 * 1 / 2, 3 / 4 * 1 / 2 - 1 / 2)),
        (spec_of("total_variation"), 1 / 4, (-3 / 16, 3 / 16)),
        (FORWARD._replace(hard_weight=2.0), (d0 + d1) / 2 + 2 * ln(4), (-1 / 4 - 2 * 3 / 4, 1 / 4 + 2 * 3 / 4)),
    ]
    for spec, value, grad in cases:
        result = divergence_by_triton(student, teacher, spec, tokens=torch.tensor([0]))
        assert result.value.item() == pytest.approx(value, rel=1e-14)
        assert result.grad_logits[0].tolist() == pytest.approx(grad, rel=1e-13)
    scores = dict(zip(FIELDS, result.scores[:, 0].tolist(), strict=True))
    expected = {
        "forward_kl": (d0 + d1) / 2,
        "reverse_kl": reverse,
        "student_entropy": ln(4) - 3 / 4 * ln(3),
        "teacher_entropy": ln(2),
        "student_logprob": -ln(4),
        "teacher_logprob": -ln(2),
        "top1_agreement": 0.0,
        "student_lost_mass": 0.0,
        "teacher_lost_mass": 0.0,
    }
    assert scores == pytest.approx(expected, rel=1e-14)
