"""The Triton kernels that read rows, on rows of many small blocks: those without a mask, where the largest entry rises block by
block, and what sends a row of topd::divergence_rows back to the careful way."""

import math

import pytest
import torch
from torch import Tensor
from triton_cases import (
    KINDS,
    NEEDS_TRITON,
    assert_divergence,
    assert_logprobs,
    divergence_by_triton,
    divergence_truth,
    logprobs_by_triton,
    random_logits,
    spec_of,
)

from topd.ops.linear_logprobs.spec import LogprobSpec
from topd.scores import FIELDS
from topd_kernels.divergence_rows.launches import Blocks, kind_of
from topd_kernels.divergence_rows.terms import EVEN_JSD, JSD
from topd_kernels.logprob_rows import launches as logprob_rows

pytestmark = NEEDS_TRITON
INF, NAN = math.inf, math.nan
SMALL = Blocks(32, 32)
SMALL_LOGPROBS = logprob_rows.Blocks(32, 32, 8)
VOCAB = 110  # three blocks and a rest
REVERSE = spec_of("reverse_kl")


def certain_and_near_rows() -> tuple[Tensor, Tensor]:
    """A KL of 1e-8, and of 1e-7; p = 1 - 1e-9 on both sides, and on one; logits of 1e4; offsets of 100 either way."""
    student = 2 * torch.randn(8, VOCAB)
    teacher = student + torch.tensor([1.4e-4] + [4e-4] * 7).unsqueeze(-1) * torch.randn(8, VOCAB)
    student[1, 70] = teacher[1, 70] = student[2, 70] = 30.0
    teacher[1, 70] += 0.5
    student[3] *= 3e3
    teacher[3] = student[3] + torch.randn(VOCAB)
    teacher[4] = 2 * torch.randn(VOCAB) + 100
    teacher[5] = student[5] + 1e-2 * torch.randn(VOCAB)
    student[5] += 100
    teacher[6] = student[6] + 1e-2 * torch.randn(VOCAB) + 7
    return student, teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_each_divergence(divergence, parameter, dtype):
    """One program a row, or three: two of a block, and one of a block and the row's rest."""
    student, teacher = random_logits(4, VOCAB, VOCAB, dtype)
    spec = spec_of(divergence, parameter)
    result = divergence_by_triton(student, teacher, spec, splits=1 if dtype == torch.float64 else 3, blocks=SMALL)
    assert_divergence(result, student, teacher, spec)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_near_equal_and_certain_rows_keep_their_digits(divergence, parameter):
    student, teacher = certain_and_near_rows()
    spec = spec_of(divergence, parameter)
    result = divergence_by_triton(student, teacher, spec, blocks=SMALL, scores=divergence == "reverse_kl")
    assert_divergence(result, student, teacher, spec)
    assert (result.value >= 0).all() or parameter == 0.05
    if divergence != "total_variation":
        true = divergence_truth(student, teacher, spec).value
        assert 0 < true[0] < 1e-7 / 2
        for row in (0, 7):
            assert result.value[row].item() == pytest.approx(true[row].item(), rel=1e-5)


@pytest.mark.parametrize("order", ["rising", "falling", "one side each"])
def test_the_largest_entry_moves_from_block_to_block(order):
    student = 0.1 * torch.arange(VOCAB).repeat(2, 1) + torch.randn(2, VOCAB)
    teacher = student + torch.tensor([[1e-3], [1.0]]) * torch.randn(2, VOCAB)
    if order == "falling":
        student, teacher = student.flip(-1), teacher.flip(-1)
    if order == "one side each":
        teacher = teacher.flip(-1)
    assert_divergence(divergence_by_triton(student, teacher, REVERSE, blocks=SMALL), student, teacher, REVERSE)


@pytest.mark.parametrize("scale", [0.7, -1.3])
def test_equal_sides_are_exactly_equal_whatever_their_scale(scale):
    tile = torch.cat([torch.randn(1, VOCAB) * 20, torch.zeros(1, VOCAB)])
    for divergence, parameter in KINDS:
        spec = spec_of(divergence, parameter, student_scale=scale, teacher_scale=scale, temperature=0.9)
        result = divergence_by_triton(tile, tile, spec, scores=False, blocks=SMALL)
        assert result.value.tolist() == [0, 0]
        assert not result.grad_logits.any()


@pytest.mark.parametrize(("divergence", "parameter"), [("forward_kl", INF), ("reverse_kl", 0.0), ("jsd", 0.3)])
def test_probabilities_of_zero_within_whole_blocks(divergence, parameter):
    """One entry of both sides, of the student's alone, of the teacher's alone; a whole block; a row without any."""
    student, teacher = random_logits(6, VOCAB, VOCAB)
    student[0, 40] = teacher[0, 40] = student[1, 3] = teacher[2, 109] = -INF
    student[3, 32:64] = teacher[3, :80] = -INF
    student[4, :100] = teacher[4, :100] = -INF
    spec = spec_of(divergence, parameter)
    result = divergence_by_triton(student, teacher, spec, blocks=SMALL, splits=2)
    assert_divergence(result, student, teacher, spec)
    assert result.scores[FIELDS.index("forward_kl")].isinf().tolist() == [False, True, False, False, False, False]
    assert result.scores[FIELDS.index("reverse_kl")].isinf().tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_rows_without_a_distribution_stand_alone(name, dtype):
    """NaN and +inf on either side, in the first block, a later one and the rest; nothing but -inf."""
    student, teacher = random_logits(8, VOCAB, VOCAB, dtype)
    student[1, 0] = teacher[2, 60] = student[3, 109] = NAN
    student[4, 50] = teacher[5, 0] = INF
    student[6] = -INF
    spec = spec_of(name, 0.5)
    result = divergence_by_triton(student, teacher, spec, blocks=SMALL)
    assert_divergence(result, student, teacher, spec)
    assert result.finite.tolist() == [True, *[False] * 6, True]
    assert result.grad_logits.any(-1).tolist() == result.finite.tolist()


def test_every_option_over_whole_blocks():
    """Temperature, softcap, biases, scale of either sign; the token's cross-entropy beside, and without."""
    student, teacher = random_logits(4, VOCAB, VOCAB + 9)
    options = {
        "student_bias": torch.randn(VOCAB, dtype=torch.float64),
        "teacher_bias": torch.randn(VOCAB + 9, dtype=torch.float64),
        "tokens": torch.tensor([4, 12, 109, 70]),
    }
    numbers = {"student_scale": -0.7, "student_softcap": 6.0, "teacher_scale": 1.3, "temperature": 1.5}
    for hard_weight in (0.0, 0.4):
        spec = spec_of("reverse_kl", hard_weight=hard_weight, **numbers)
        result = divergence_by_triton(student, teacher, spec, blocks=SMALL, **options)
        assert_divergence(result, student, teacher, spec, **options)


@pytest.mark.parametrize(("divergence", "parameter"), KINDS)
def test_rows_that_fill_no_block_and_rows_of_one_entry(divergence, parameter):
    """13 entries, one, and one with probability among many, in the first block, a later one, the rest, on one side and both."""
    spec = spec_of(divergence, parameter)
    for vocab in (1, 13):
        student, teacher = (tile.float() for tile in random_logits(3, vocab, vocab))
        result = divergence_by_triton(student, teacher, spec, scores=False, blocks=SMALL)
        assert_divergence(result, student, teacher, spec)
    student, teacher = torch.full((2, 4, VOCAB), -INF)
    for row, (first, second) in enumerate([(5, 5), (70, 70), (109, 109), (3, 40)]):
        student[row, first] = teacher[row, second] = 2.0 - row
    result = divergence_by_triton(student, teacher, spec, scores=False, blocks=SMALL)
    assert_divergence(result, student, teacher, spec)


@pytest.mark.parametrize("sides", [(30.0, 30.0), (30.0, 0.0), (0.0, 30.0)], ids=["both", "student", "teacher"])
def test_a_side_rises_in_a_block_in_which_the_other_does_not(sides):
    """In the first block, a later one, the last whole one and the rest."""
    for place in (0, 50, 95, 109):
        student, teacher = (tile.float() for tile in random_logits(3, VOCAB, VOCAB))
        student[:, place] += sides[0]
        teacher[:, place] += sides[1]
        result = divergence_by_triton(student, teacher, REVERSE, scores=False, blocks=SMALL)
        assert_divergence(result, student, teacher, REVERSE)


def test_the_even_jsd_is_a_kind_of_its_own_in_float32():
    assert kind_of("jsd", 0.5, 4) == EVEN_JSD.value
    assert kind_of("jsd", 0.5, 8) == kind_of("jsd", 0.3, 4) == JSD.value


@pytest.mark.parametrize("gap", [1e-4, 1e-2, 0.9, 1.1, 5.0, 40.0, 1e3])
def test_the_even_jsd_at_any_distance_of_the_sides(gap):
    student = torch.randn(2, VOCAB)
    teacher = student + gap * torch.tensor([1.0, -1.0]).unsqueeze(-1) * torch.randn(VOCAB).sign()
    spec = spec_of("jsd", 0.5)
    result = divergence_by_triton(student, teacher, spec, scores=False, blocks=SMALL)
    assert_divergence(result, student, teacher, spec)
    assert result.value.tolist() == pytest.approx(divergence_truth(student, teacher, spec).value.tolist(), rel=1e-5)


@pytest.mark.parametrize("order", ["rising", "falling", "certain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_logprobs_whose_largest_entry_moves_from_block_to_block(order, dtype):
    """Ids are the largest entries, or none of them: what is left out of a row is never its largest."""
    product = (0.1 * torch.arange(VOCAB).repeat(3, 1) + torch.randn(3, VOCAB)).to(dtype)
    if order == "falling":
        product = product.flip(-1)
    if order == "certain":
        product[torch.arange(3), torch.tensor([2, 60, 108])] = 40.0
    for ids in (product.topk(5).indices, product.topk(5, largest=False).indices):
        for splits in (1, 2):
            assert_logprobs(logprobs_by_triton(product, ids, blocks=SMALL_LOGPROBS, splits=splits), product, ids)


def test_logprobs_of_rows_whose_blocks_have_no_probability():
    """The first block, all but the rest, a block that the ids leave out, all of a row; NaN, +inf, in a block and the rest."""
    product = torch.randn(8, VOCAB, dtype=torch.float64)
    product[0, :32] = product[1, :96] = product[3] = -INF
    product[4, 70] = product[5, 109] = NAN
    product[6, 3] = product[7, 100] = INF
    ids = torch.arange(32, 64).repeat(8, 1)
    for spec in (LogprobSpec(1.0, None, 1.0), LogprobSpec(-0.7, 20.0, 1.3)):
        assert_logprobs(logprobs_by_triton(product, ids, spec, blocks=SMALL_LOGPROBS), product, ids, spec)


def test_the_first_of_equal_entries_is_the_most_likely_one():
    """In other lanes, other blocks and the row's rest."""
    student = torch.randn(4, VOCAB, dtype=torch.float64)
    teacher = student + torch.randn(4, VOCAB)
    student[:, [7, 3, 90, 109]] = 11.0
    teacher[[0, 1, 2], [3, 7, 109]] = 9.0
    teacher[3, [3, 90]] = 9.0
    result = divergence_by_triton(student, teacher, REVERSE, grad=None, blocks=SMALL)
    assert result.scores[FIELDS.index("top1_agreement")].tolist() == [1, 0, 0, 1]
