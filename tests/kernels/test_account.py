"""The static account: what launches declare is what the kernels do, and the plan is the best that the account knows."""

import math

import pytest
import torch

from tools.account import GIB, SHAPES
from tools.instructions import PARAMETERS, divergence_launches
from topd.costs.products import plan_of, products_of
from topd.ops.shared.plan import GPU_BLOCK, MAX_PILE
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.scaled_rows import launches as scaled_rows
from topd_kernels.shared.launch import ROW_PROGRAMS_PER_PROCESSOR, Launch, interpreted
from topd_kernels.transport import launches as transport
from topd_kernels.weighted_gather import launches as weighted_gather
from topd_kernels.weighted_scatter import launches as weighted_scatter

ROWS, IDS = 2, 70
# One of each way through the kernels: without E, E in a second sweep, E with the statistics, a mixture.
KINDS = (("forward_kl", math.inf), ("forward_kl", 0.05), ("reverse_kl", 0.0), ("jsd", 0.3))
VOCAB = 16_384


@pytest.fixture
def watch():
    if not interpreted(statistics):
        pytest.skip("the kernels run on a GPU here; counting needs Triton's interpreter")
    from tools.watched import run_watched

    return run_watched


def falling(*shape: int) -> torch.Tensor:
    """Entries whose largest comes first: no block rises above one before it, which would be read again."""
    return torch.randn(shape).sort(-1, descending=True).values


def assert_declared(launches: list[Launch], watch) -> None:
    """Every launch reads and writes the bytes that it declares, its scratch apart."""
    for launch, counts in zip(launches, watch(launches), strict=True):
        counted = counts.read + counts.written - counts.scratch
        assert launch.moved_bytes == counted, launch.name
        if not counts.scratch:
            assert (launch.read_bytes, launch.written_bytes) == (counts.read, counts.written), launch.name


@pytest.mark.parametrize(("kind", "parameter"), KINDS)
def test_declared_bytes_of_divergence_rows(kind, parameter, watch):
    """Plain; then a bias, tokens, two programs a row; then every option: both biases, scores, unequal vocabularies."""
    tokens, spec = torch.tensor([0, 519]), divergence_rows.Spec(1.0, None, 1.0, None, 0.7, kind, parameter, 0.2)

    def check(vocabs, student_bias, teacher_bias, tokens, *, scores, splits):
        student, teacher = (falling(ROWS, vocab) for vocab in vocabs)
        operands = (student, teacher, student_bias, teacher_bias, tokens)
        for grad in (None, torch.empty(student.shape, dtype=torch.float16)):
            assert_declared(divergence_rows.launches(*operands, spec, grad, scores, splits=splits)[0], watch)

    check((520, 520), None, None, None, scores=False, splits=1)
    check((520, 530), falling(520), None, tokens, scores=False, splits=2)
    check((1100, 1090), falling(1100), falling(1090).double(), tokens, scores=True, splits=2)


@pytest.mark.parametrize("grad", [None, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("biased", "softcap", "count", "splits"),
    [(False, None, IDS, 1), (True, None, IDS, 2), (True, 5.0, IDS, 1), (False, None, 0, 2)],
)
def test_declared_bytes_of_logprob_rows(biased, softcap, count, splits, grad, watch):
    product, spec = falling(ROWS, 2100), logprob_rows.Spec(1.0, softcap, 0.7)
    bias, ids = falling(2100) if biased else None, torch.stack([torch.randperm(2100)[:count] for _ in range(ROWS)])
    for entropy in (False, True):
        tile = None if grad is None else product.to(grad)
        second = torch.empty_like(tile) if entropy and tile is not None else None
        assert_declared(logprob_rows.launches(product, bias, ids, spec, second, tile, entropy, splits=splits)[0], watch)


@pytest.mark.parametrize("width", [1, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_declared_bytes_of_weighted_rows(dtype, width, watch):
    ids, weights = torch.randperm(90)[:70].view(ROWS, 35), torch.randn(ROWS, 35)
    rows, table = torch.randn(ROWS, width), torch.randn(90, width)
    assert_declared(weighted_gather.launches(rows, table.to(dtype), ids, weights), watch)
    assert_declared(weighted_scatter.launches(table, rows.to(dtype), ids, weights), watch)


@pytest.mark.parametrize("width", [1, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_declared_bytes_of_scaled_rows(dtype, width, watch):
    x = torch.randn(ROWS, width)
    assert_declared(scaled_rows.launches(x.to(dtype), x, torch.randn(ROWS)), watch)


@pytest.mark.parametrize("cost", transport.COSTS)
@pytest.mark.parametrize("windows", [(7, 5), (70, 66)], ids=["registers", "panels"])
def test_declared_bytes_of_transport(windows, cost, watch):
    tables = [torch.randn(13, 6), torch.randn(13, 6, dtype=torch.float64)]
    ids, lengths = [torch.randint(13, (2, k)) for k in windows], [torch.full((2,), k) for k in windows]
    operands = (tables[0], ids[0], lengths[0], tables[1], ids[1], lengths[1])
    assert_declared(transport.launches(*operands, cost, 0.05, 3, 1e-4)[0], watch)


@pytest.mark.parametrize("divergence", PARAMETERS)
def test_bytes_of_an_entry(divergence):
    """The tiles' entries are what the declared bytes of a large vocabulary are made of; as many rows as have a program each."""
    launches = divergence_launches(divergence, ROW_PROGRAMS_PER_PROCESSOR, VOCAB, "sm_90")
    entry = {"statistics": 8, "constants": 0, "sweep": 8 + 2 if divergence != "jsd" else 8 + 8 + 2, "finish": 0}
    declared = dict.fromkeys(entry, 0.0)
    for launch in launches:
        declared[launch.name] += launch.moved_bytes / (ROW_PROGRAMS_PER_PROCESSOR * VOCAB)
    assert declared == pytest.approx(entry, abs=512 / VOCAB)  # a row's own numbers


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("workspace", [GIB // 2, 2 * GIB, 8 * GIB])
def test_no_other_plan_within_the_workspace_has_less_traffic(shape, weight_grad, workspace):
    products = products_of(shape, weight_grad)
    chosen = plan_of(shape, workspace, weight_grad=weight_grad)
    assert chosen.workspace_bytes <= workspace
    best = products.traffic(chosen)
    for rows in range(GPU_BLOCK, shape.n + 1, GPU_BLOCK):
        chunks = -(-shape.n // rows)
        for pile in range(1, min(chunks, MAX_PILE) + 1):
            if rows * shape.vocab * (8 + 2 * pile) <= workspace:
                assert products.bytes_per_column(shape.n / chunks, chunks / -(-chunks // pile)) >= best - 1e-9
