"""topd::score_tokens, the fused kernels: in Triton's interpreter on a CPU, on a GPU where there is one, beside float64."""

import math

import pytest
import torch
from torch import Tensor

from topd.head import Head
from topd.ops.linear_divergence.full_logits import linear_divergence as reference
from topd.ops.linear_divergence.spec import RowSpec
from topd.ops.score_tokens.op import run_scores, serves
from topd.ops.shared.tiles import Side
from topd.scores import FIELDS

kernels = pytest.importorskip("topd_kernels.score_tokens.launches", reason="triton is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter overflows as a GPU would

INF, NAN = math.inf, math.nan
SMALL = kernels.Tile(16, 16, 16, 4)
WIDE = kernels.Tile(16, 512, 32, 4)  # the interpreter's time goes with the number of tiles, not with their size
PLAIN = RowSpec(1.0, None, 1.0, None, 1.0, "forward_kl", INF, 0.0)


@pytest.fixture(autouse=True)
def _runs_here(device):
    from topd_kernels.shared.launch import interpreted

    if device.type == "cpu" and not interpreted(kernels.score_blocks):
        pytest.skip("CPU tensors need TRITON_INTERPRET=1 when the kernels are defined")


def side(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Side:
    return Side(hidden, weight, bias, None, None, 1.0)


def random_side(n: int, vocab: int, width: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> Side:
    """Logits of standard deviation 3; every third row three times as large."""
    hidden = torch.randn(n, width) * (3 / math.sqrt(width))
    hidden[::3] *= 3
    offset = torch.randn(vocab).to(dtype) if bias else None
    return side(hidden.to(dtype), torch.randn(vocab, width).to(dtype), offset)


def from_logits(student: Tensor, teacher: Tensor) -> tuple[Side, Side]:
    """Rows [N, V] of logits through unit hidden states: every product is exact."""
    eye = torch.eye(student.shape[0])
    return side(eye, student.T.contiguous()), side(eye, teacher.T.contiguous())


def moved(operands: Side, device: torch.device) -> Side:
    return Side(*(x.to(device) if isinstance(x, Tensor) else x for x in operands))


def fused(
    student: Side,
    teacher: Side,
    tokens: Tensor | None,
    device: torch.device,
    *,
    spec: RowSpec = PLAIN,
    blocks=None,
    splits: int | None = None,
) -> Tensor:
    """Scores [9, N] by the kernels, launched as `run_scores` has them; a GPU takes its own tiles."""
    blocks = blocks if device.type == "cpu" else None

    def implementation(s_hidden, s_weight, s_bias, t_hidden, t_weight, t_bias, tokens, *numbers):
        s_scale, s_softcap, t_scale, t_softcap, temperature = numbers
        sides = (
            kernels.Operands(s_hidden, s_weight, s_bias, s_scale, s_softcap),
            kernels.Operands(t_hidden, t_weight, t_bias, t_scale, t_softcap),
        )
        order, scores = kernels.launches(*sides, tokens, temperature, blocks=blocks, splits=splits)
        for launch in order:
            launch.run()
        return scores

    assert serves(student, teacher)
    tokens = None if tokens is None else tokens.to(device)
    return run_scores(implementation, moved(student, device), moved(teacher, device), tokens, spec).cpu()


def truth(student: Side, teacher: Side, tokens: Tensor | None, spec: RowSpec = PLAIN) -> Tensor:
    """The float64 reference on the same operands, which refuses tokens outside the common vocabulary: -inf for them here."""
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    outside = torch.zeros(student.hidden.shape[0], dtype=torch.bool) if tokens is None else (tokens < 0) | (tokens >= vocab)
    tokens = None if tokens is None else tokens.masked_fill(outside, 0)
    sides = []
    for operands, scale, softcap in (
        (student, spec.student_scale, spec.student_softcap),
        (teacher, spec.teacher_scale, spec.teacher_softcap),
    ):
        bias = None if operands.bias is None else operands.bias.double()
        sides += [operands.hidden.double(), Head(operands.weight.double(), bias, scale=scale, softcap=softcap)]
    scores = reference(*sides, None, tokens, spec)[1]
    scores[4:6, outside] = -INF
    return scores


def assert_scores(result: Tensor, true: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert result.dtype == torch.float32
    for name, row, true_row in zip(FIELDS, result.double(), true, strict=True):
        tolerance = {"rtol": 0, "atol": 0} if name == "top1_agreement" else {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(row, true_row, **tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def test_literal(device):
    """p_S = (1/2, 1/2), p_T = (1/4, 3/4) of a common vocabulary of two; the teacher's third entry has half of its mass."""
    student = side(torch.ones(2, 1), torch.zeros(2, 1))
    teacher = side(torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)], [math.log(4)]]))
    result = fused(student, teacher, torch.tensor([1, 2]), device, blocks=SMALL)
    log = math.log
    forward, reverse = 1 / 4 * log(1 / 2) + 3 / 4 * log(3 / 2), 1 / 2 * log(2) + 1 / 2 * log(2 / 3)
    entropy = 1 / 4 * log(4) + 3 / 4 * log(4 / 3)
    expected = [forward, reverse, log(2), entropy, -log(2), log(3 / 4), 0, 0, 1 / 2]
    outside = [*expected[:4], -INF, -INF, *expected[6:]]
    torch.testing.assert_close(result, torch.tensor([expected, outside]).T, rtol=1e-6, atol=1e-7)


def test_rows_and_entries_that_fill_no_block(device):
    """One row, 7, 130; vocabularies of 1, 13, 100; odd widths that differ; the default tiles."""
    for n, vocab, s_width, t_width in ((1, 1, 1, 3), (7, 13, 5, 3), (130, 90, 67, 33)):
        student, teacher = random_side(n, vocab, s_width), random_side(n, vocab, t_width)
        tokens = torch.randint(vocab, (n,))
        assert_scores(fused(student, teacher, tokens, device), truth(student, teacher, tokens))


@pytest.mark.parametrize("vocabs", [(1000, 1000), (1000, 1300), (4099, 1000)], ids=str)
def test_large_vocabularies_equal_and_not(vocabs, device):
    student, teacher = random_side(7, vocabs[0], 33), random_side(7, vocabs[1], 20)
    tokens = torch.randint(min(vocabs), (7,))
    tokens[3:6] = torch.tensor([-1, min(vocabs), 10**12])
    assert_scores(fused(student, teacher, tokens, device, blocks=WIDE), truth(student, teacher, tokens))


@pytest.mark.parametrize(
    "pair", [(torch.float16, torch.float16), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
def test_dtypes(pair, device):
    """Sides may differ; the truth is that of the rounded operands."""
    student, teacher = (random_side(5, 300, width, dtype=dtype, bias=True) for width, dtype in zip((24, 17), pair, strict=True))
    tokens = torch.randint(300, (5,))
    assert_scores(fused(student, teacher, tokens, device, blocks=WIDE), truth(student, teacher, tokens))


OPTIONS = {
    "temperature": (PLAIN._replace(temperature=0.7), False),
    "scales": (PLAIN._replace(student_scale=0.3, teacher_scale=1.7), False),
    "a softcap": (PLAIN._replace(teacher_softcap=5.0), False),
    "all": (RowSpec(0.8, 8.0, 1.2, 30.0, 1.5, "forward_kl", INF, 0.0), True),
}


@pytest.mark.parametrize(("spec", "bias"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(spec, bias, device):
    student, teacher = random_side(5, 300, 9, bias=bias), random_side(5, 350, 7, bias=bias)
    tokens = torch.randint(300, (5,))
    result = fused(student, teacher, tokens, device, spec=spec, blocks=WIDE)
    assert_scores(result, truth(student, teacher, tokens, spec))


def test_no_tokens(device):
    student, teacher = random_side(5, 50, 9), random_side(5, 50, 7)
    assert_scores(fused(student, teacher, None, device), truth(student, teacher, None))


FORBIDDEN = {
    "both sides": ([0.3, -INF, 1.0, -2.0], [1.0, -INF, -0.5, 0.1]),
    "student": ([0.3, -INF, 1.0, -2.0], [1.0, 0.2, -0.5, 0.1]),
    "teacher": ([0.3, 0.4, 1.0, -2.0], [1.0, -INF, -0.5, 0.1]),
    "disjoint": ([0.3, -INF, 1.0, -INF], [-INF, 0.7, -INF, 0.1]),
    "one entry left": ([-INF, -INF, 1.0, -INF], [-INF, -INF, 5.0, -INF]),
    "underflow": ([0.3, -INF, 1.0, -200.0], [1.0, -200.0, -0.5, -INF]),
    "student none": ([-INF] * 4, [1.0, -200.0, -0.5, 0.1]),
    "nan": ([0.3, NAN, 1.0, -2.0], [1.0, 2.0, -0.5, 0.1]),
    "infinity": ([0.3, 0.1, 1.0, -2.0], [1.0, INF, -0.5, 0.1]),
}


@pytest.mark.parametrize("logits", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_probabilities_of_zero_and_no_distribution(logits, device):
    """Biases of -inf beside others in one block, and each of four alone in a block without mass otherwise; NaN only where a row
    has no distribution."""
    biases = []
    for values in logits:
        bias = torch.full((64,), -INF)
        bias[::16] = torch.tensor(values)
        biases.append(bias)
    for pair in (tuple(bias[::16] for bias in biases), tuple(biases)):
        nothing = torch.zeros(len(pair[0]), 1)
        student, teacher = (side(nothing[:1], nothing, bias) for bias in pair)
        tokens = torch.tensor([len(nothing) // 4])
        result = fused(student, teacher, tokens, device, blocks=SMALL, splits=2)
        assert_scores(result, truth(student, teacher, tokens), rtol=1e-6, atol=1e-7)


def test_near_equal_sides_keep_their_digits(device):
    """KL 5e-5 down to 5e-10: within 1e-3 of float64 on the same logits, and never negative; in 9 blocks and 3 splits."""
    logits = 3 * torch.randn(6, 4099)
    distance = torch.tensor([1e-2, 1e-3, 3e-4, 1e-4, 5e-5, 3e-5]).unsqueeze(-1)
    teacher = logits + distance * torch.randn(6, 4099)
    sides = from_logits(logits, teacher)
    result, true = fused(*sides, None, device, blocks=WIDE, splits=3), truth(*sides, None)
    assert true[0].min() < 1e-9
    for i in (0, 1):
        assert (result[i] >= 0).all()
        assert ((result[i] - true[i]).abs() / true[i]).max() < 1e-3
    torch.testing.assert_close(result[2:4].double(), true[2:4], rtol=1e-6, atol=0)


def test_equal_sides_are_exactly_zero(device):
    rows = torch.stack([8 * torch.randn(50), torch.full((50,), 3.7), torch.eye(50)[7] * 1e4, torch.randn(50) * 1e-3])
    result = fused(*from_logits(rows, rows), None, device, blocks=SMALL, splits=2)
    assert not result[:2].any()
    assert result[6].all()


def test_peaked_rows_keep_their_digits(device):
    """All but 1e-5 to 1e-12 of the mass on one entry: KLs, entropies and log-probabilities to 1e-4 of themselves."""

    def peaked(gap: float) -> Tensor:
        row = 0.3 * torch.randn(64)
        row[9] = gap
        return row

    student = torch.stack([peaked(gap) for gap in (15.0, 20.0, 25.0, 30.0)])
    teacher = torch.stack([peaked(gap) for gap in (16.0, 18.0, 25.5, 22.0)])
    sides, tokens = from_logits(student, teacher), torch.full((4,), 9)
    result, true = fused(*sides, tokens, device, blocks=SMALL, splits=2), truth(*sides, tokens)
    torch.testing.assert_close(result[:6].double(), true[:6], rtol=1e-4, atol=0)


def test_huge_one_hot_and_flat_logits(device):
    eye, flat = torch.eye(40), torch.zeros(1, 40)
    huge = torch.cat([1e4 * eye[:3], -1e4 * eye[:2], flat, flat + 1e4, flat - 1e4, 1e4 * torch.randn(2, 40)])
    sides = from_logits(huge.repeat_interleave(10, 0), huge.repeat(10, 1))
    result, true = fused(*sides, None, device, blocks=kernels.Tile(128, 16, 32, 4)), truth(*sides, None)
    assert (result[:2] >= 0).all()
    assert_scores(result, true, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_smaller_entry(device):
    """Equal largest logits within a block, in two blocks and in two splits."""
    logits = torch.zeros(4, 64)
    logits[0, [3, 5]], logits[1, [3, 20]], logits[2, [3, 60]], logits[3, [4, 60]] = 1.0, 1.0, 1.0, 1.0
    only = torch.zeros(4, 64)
    only[:, 3] = 1.0
    result = fused(*from_logits(logits, only), None, device, blocks=SMALL, splits=2)
    assert result[6].tolist() == [1, 1, 1, 0]


def test_splits_change_nothing_but_rounding_and_one_plan_repeats_itself(device):
    student, teacher = random_side(7, 90, 9), random_side(7, 99, 9)
    tokens = torch.randint(90, (7,))
    one, many, again = (fused(student, teacher, tokens, device, blocks=SMALL, splits=splits) for splits in (1, 6, 6))
    assert torch.equal(many, again)
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_no_rows(device):
    assert fused(random_side(0, 9, 3), random_side(0, 9, 3), None, device).shape == (9, 0)


def test_what_the_kernel_serves():
    plain, adapted = random_side(2, 3, 4), random_side(2, 3, 4)._replace(a=torch.ones(1, 4), b=torch.ones(3, 1))
    half = random_side(2, 3, 4, dtype=torch.float16)
    assert serves(plain, half)
    assert not serves(plain, adapted)
    assert not serves(random_side(2, 3, 4, dtype=torch.float64), plain)
    assert not serves(half._replace(weight=half.weight.float()), plain)


def test_the_fake_knows_the_shape():
    with torch.device("meta"):
        sides = side(torch.ones(5, 3), torch.ones(7, 3)), side(torch.ones(5, 2), torch.ones(9, 2))
    result = run_scores(torch.ops.topd.score_tokens, *sides, None, PLAIN)
    assert result.shape == (9, 5)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("processors", [1, 108, 132])
def test_the_plan_covers_the_vocabulary_within_the_grid(processors, monkeypatch):
    """Pure arithmetic: no run reaches 2^31, every split has entries, y stays within the grid; N alone changes no constant."""
    monkeypatch.setattr(kernels, "processors", lambda like: processors)
    constants = set()
    for n in (1, 2, 16, 100, 129, 1000, 4096, 5000, 10**5, 10**6):
        with torch.device("meta"):
            sides = [kernels.Operands(torch.ones(n, 64), torch.ones(v, 64), None, 1.0, None) for v in (151_936, 152_064)]
            order, _ = kernels.launches(*sides, None, 1.0)
        blocks, tail, finish = order
        assert blocks.grid[0] * blocks.constants["BM"] >= n
        assert (blocks.grid[1] - 1) * blocks.arguments["run"] < 151_936 <= blocks.grid[1] * blocks.arguments["run"]
        assert max(blocks.grid[1], tail.grid[1]) <= 65_535
        assert finish.arguments["splits"] == blocks.grid[1]
        constants.add(repr([launch.constants for launch in order]))
    assert len(constants) == 1


def test_rows_that_are_not_aligned_take_smaller_tiles():
    """Rows that do not begin on 16 entries are loaded one entry at a time: with the same tiles the kernel would spill. Tiles of
    float32 alone are that small anyway, for Triton 3.6."""
    wide, narrow = torch.float32, torch.bfloat16
    for student, teacher in ((narrow, torch.float16), (wide, narrow)):
        tiles = []
        for width in (32, 33):
            sides = [
                kernels.Operands(torch.empty(3, width, dtype=d), torch.empty(70, width, dtype=d), None, 1.0, None)
                for d in (student, teacher)
            ]
            launch = kernels.launches(*sides, None, 1.0)[0][0]
            tiles.append((*(launch.constants[name] for name in ("BM", "BN", "BK")), launch.num_warps))
        aligned, other = tiles
        assert math.prod(other[:3]) / other[3] < math.prod(aligned[:3]) / aligned[3]
