"""No kernel leaves its tensors, whatever the shape. In Triton's interpreter, watched."""

from dataclasses import replace

import pytest
import torch

from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.scaled_rows import launches as scaled_rows
from topd_kernels.shared.launch import Launch, interpreted
from topd_kernels.transport import launches as transport
from topd_kernels.weighted_gather import launches as weighted_gather
from topd_kernels.weighted_scatter import launches as weighted_scatter

if not interpreted(statistics):
    pytest.skip("the kernels run on a GPU here; the watch needs Triton's interpreter", allow_module_level=True)

from tools.watched import OutOfBoundsError, run_watched, total

ROWS, VOCAB = 3, 1003


def divergence_launches(
    kind: str = "jsd", vocabs: tuple[int, int] = (VOCAB, VOCAB), scores: bool = True, splits: int = 2
) -> list[Launch]:
    student, teacher = (torch.randn(ROWS, vocab) for vocab in vocabs)
    biases = [torch.randn(vocab) for vocab in vocabs]
    tokens = torch.tensor([0, min(vocabs) - 1, -1])
    spec = divergence_rows.Spec(1.0, 5.0, 1.0, None, 0.7, kind, 0.3, 0.2)
    grad = torch.empty(ROWS, vocabs[0], dtype=torch.bfloat16)
    return divergence_rows.launches(student, teacher, *biases, tokens, spec, grad, scores, splits=splits)[0]


def logprob_launches(vocab: int = VOCAB, splits: int = 2) -> list[Launch]:
    product, ids = torch.randn(ROWS, vocab), torch.randint(-1, vocab + 1, (ROWS, 70))
    second = torch.empty(ROWS, vocab, dtype=torch.float16)
    spec = logprob_rows.Spec(1.0, 5.0, 0.7)
    return logprob_rows.launches(product, torch.randn(vocab), ids, spec, second, product, True, splits=splits)[0]


def weighted_launches(width: int) -> list[Launch]:
    ids, weights = torch.randint(-1, 14, (ROWS, 5)), torch.randn(ROWS, 5)
    rows, table = torch.randn(ROWS, width), torch.randn(13, width)
    return weighted_gather.launches(rows, table, ids, weights) + weighted_scatter.launches(table, rows, ids, weights)


def scaled_launches(width: int) -> list[Launch]:
    x, scale = torch.randn(ROWS, width), torch.tensor([0.5, 0.0, -2.0])
    return scaled_rows.launches(x.bfloat16(), x, scale) + scaled_rows.launches(x.clone(), x, scale[:1].expand(ROWS))


def transport_launches(cost: str = "cosine", windows: tuple[int, int] = (7, 5), steps: int = 20) -> list[Launch]:
    """Two problems, one with shorter windows; what stands past a length names no row of the tables."""
    tables = [torch.randn(13, 6) for _ in range(2)]
    ids, lengths = [torch.randint(13, (2, window)) for window in windows], torch.tensor([3, min(windows)])
    for each in ids:
        each[0, 3:], each[1, 0] = 10**9, 12
    return transport.launches(tables[0], ids[0], lengths, tables[1], ids[1], lengths, cost, 0.05, steps, 1e-4)[0]


def panel_launches(cost: str = "cosine") -> list[Launch]:
    return transport_launches(cost, (70, 66), 4)


@pytest.mark.parametrize("cost", transport.COSTS)
def test_transport_stays_within_its_tensors(cost):
    assert total(run_watched(transport_launches(cost))).written == 2 * (7 * 5 + 2) * 4


@pytest.mark.parametrize("cost", transport.COSTS)
def test_transport_by_panels_stays_within_its_tensors(cost):
    counts = total(run_watched(panel_launches(cost)))
    assert counts.written >= 2 * (70 * 66 + 2) * 4 + 8 * 2 * 70 * 66  # and costs and plan into scratch


@pytest.mark.parametrize("vocabs", [(1, 1), (VOCAB, VOCAB), (1030, VOCAB), (VOCAB, 1030)])
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_divergence_rows_stays_within_its_tensors(kind, vocabs):
    counts = total(run_watched(divergence_launches(kind, vocabs)))
    assert counts.written >= ROWS * vocabs[0] * 2
    assert counts.read >= 2 * ROWS * sum(vocabs) * 4


@pytest.mark.parametrize("vocab", [1, VOCAB, 2049])
def test_logprob_rows_stays_within_its_tensors(vocab):
    counts = total(run_watched(logprob_launches(vocab)))
    assert counts.written >= ROWS * vocab * (4 + 2)


@pytest.mark.parametrize("width", [1, 600])
def test_weighted_rows_stay_within_their_tensors(width):
    assert total(run_watched(weighted_launches(width))).read > 0


@pytest.mark.parametrize("width", [1, 1025])
def test_scaled_rows_stay_within_their_tensors(width):
    assert total(run_watched(scaled_launches(width))).written == ROWS * width * (2 + 4)


def planted(launches: list[Launch], kernel: str, **changed: object) -> list[Launch]:
    """The launches with a wrong number given to one kernel."""
    return [
        replace(launch, arguments={**launch.arguments, **changed}) if launch.name == kernel else launch for launch in launches
    ]


@pytest.mark.parametrize(
    ("launches", "kernel", "wrong", "verb"),
    [
        (divergence_launches, "statistics", {"vocab": VOCAB + 1}, "reads"),
        (divergence_launches, "sweep", {"vocab": VOCAB + 1}, "reads"),
        (divergence_launches, "sweep", {"student_width": VOCAB + 1}, "writes"),
        (divergence_launches, "finish", {"rows": ROWS + 1}, "reads"),
        (logprob_launches, "rest", {"vocab": VOCAB + 1}, "reads"),
        (logprob_launches, "gradient", {"stride": VOCAB + 1}, "reads"),
        (logprob_launches, "at_ids", {"count": 71}, "reads"),
        (transport_launches, "transport", {"student_window": 8}, "writes"),
        (panel_launches, "transport_panels", {"student_window": 71}, "writes"),
        (panel_launches, "transport_panels", {"problems": 3}, "reads"),
        (panel_launches, "transport_panels", {"Scratch": torch.empty(1, 1, 128, 127, dtype=torch.float64)}, "writes"),
        (transport_launches, "transport", {"width": 7}, "reads"),
        (lambda: scaled_launches(600), "scale_row", {"width": 601}, "reads"),
        (lambda: weighted_launches(600), "gather", {"width": 601}, "reads"),
        (lambda: weighted_launches(600), "scatter", {"vocab": 14}, "reads"),
    ],
)
def test_an_off_by_one_is_found(launches, kernel, wrong, verb):
    with pytest.raises(OutOfBoundsError, match=f"{kernel} {verb}"):
        run_watched(planted(launches(), kernel, **wrong))


def test_a_grid_that_no_device_takes_is_refused():
    launch = replace(divergence_launches()[0], grid=(1, 65_536))
    with pytest.raises(ValueError, match="65535"):
        launch.run()
