"""Pictures: what is drawn, what is written, that no text lies on another, and that nothing global changes."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import topd
from topd import plots

pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install "topd[plots]"')

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

PACKAGE = Path(__file__).parents[1] / "python_api"
INF, NAN = float("inf"), float("nan")


def groups(m):
    names = {"high loss": (8.0, 6.0), "random": (6.0, 10.0), "low loss": (5.0, 10.5)}
    return {name: torch.distributions.Beta(*shape).sample((m,)) for name, shape in names.items()}


def pair(plan, distance=0.25):
    """A Transport of one pair, its plan scaled to mass 1."""
    plan = torch.tensor(plan, dtype=torch.float32)
    return topd.Transport(torch.tensor([distance]), (plan / plan.sum())[None], torch.zeros(1))


def texts(figure):
    """What is written, with its place (left, bottom, right, top) in pixels, right once the figure is drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    outside = set()  # ticks past the ends of an axis are there, and never drawn
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = axes.get_xticklabels() + axes.get_yticklabels()
        outside |= {label for label in ticks if not axes.axison or not low <= label.get_position()[0] <= high}
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in outside]
    return [(text.get_text(), text.get_window_extent(renderer).extents.tolist()) for text in shown]


def written(figure):
    return [text for text, _ in texts(figure)]


def picture(figure, path):
    figure.savefig(path)
    return torch.from_numpy(imread(path)[..., :3].copy())


def check_picture(figure, path):
    """Not blank, on white, in colour; no text on another or over the edge."""
    assert isinstance(figure, Figure)
    pixels = picture(figure, path)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    assert pixels.std() > 0.02
    coloured = pixels[(pixels.amax(-1) - pixels.amin(-1)) > 0.3]
    assert len(coloured) > 50
    placed, edges = texts(figure), figure.bbox.extents.tolist()
    for text, (left, bottom, right, top) in placed:
        assert left >= edges[0] - 1, text
        assert bottom >= edges[1] - 1, text
        assert right <= edges[2] + 1, text
        assert top <= edges[3] + 1, text
    for (one, a), (other, b) in combinations(placed, 2):
        overlap = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        assert min(overlap) <= 1, (one, other)  # pixels: a box is a little larger than its ink


@pytest.mark.parametrize("m", [5, 218, 50_000])
def test_distributions_show_their_medians(m, tmp_path):
    values = groups(m)
    figure = plots.plot_distance_distribution(values, title="Distance by token loss")
    check_picture(figure, tmp_path / "distances.png")
    texts = written(figure)
    assert {"Distance by token loss", *(f"{name}\nn = {m:,}" for name in values)} <= set(texts)
    medians = [f"median {value.double().quantile(0.5).item():#.3g}" for value in values.values()]
    assert [text for text in texts if text.startswith("median")] == medians


@pytest.mark.parametrize(
    ("values", "median"),
    [([0.1, 0.2, 0.6], "0.200"), ([0.1, 0.3], "0.200"), ([0.0], "0.00"), ([125.0] * 30, "125"), ([-2e-9, 0.0, 4.5e-4], "0.00")],
)
def test_literal_medians(values, median, tmp_path):
    figure = plots.plot_distance_distribution({"all": torch.tensor(values, requires_grad=True)})
    check_picture(figure, tmp_path / "distances.png")
    assert f"median {median}" in written(figure)


def test_histograms_count_every_value():
    """Heights are relative to the fullest bin, of width 2 IQR / m^(1/3) or less: 8 values in [0, 1) and 16 twice as many."""
    value = torch.cat([torch.linspace(0, 1, 9)[:-1], torch.linspace(1, 2, 17)]).repeat(20)
    figure = plots.plot_distance_distribution({"all": value})
    (steps,) = figure.axes[0].patches
    heights, edges, _ = steps.get_data()
    assert (edges[0], edges[-1], heights.max()) == (0, 2, 1)
    counts = torch.histc(value, len(heights), 0, 2)
    assert torch.equal(torch.tensor(heights), (counts / counts.max()).double())


def test_odd_groups_are_legible(tmp_path):
    values = {
        "a long name of a group with $x_1$ in it that goes on and on, for ever, without an end": torch.rand(40) * 99,
        "equal": torch.full((25,), 55.0),
        "an outlier": torch.cat([torch.zeros(99), torch.tensor([250.0])]),
        "AVeryLongWordWithoutASpaceInTheName": torch.rand(5000, dtype=torch.bfloat16) * 60,
        "one": torch.tensor([249.0]),
        "steps": torch.randint(0, 51, (5000,)) * 5.0,
        "seventh": torch.rand(20),
    }
    check_picture(plots.plot_distance_distribution(values, title="a long title of many words " * 8), tmp_path / "odd.png")


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({}, ValueError, "one name or more"),
        ([torch.ones(3)], ValueError, "groups must be a mapping"),
        ({"a": torch.ones(3), "b": torch.ones(0)}, ValueError, r"groups\['b'\] must be \[m\], m >= 1, got \[0\]"),
        ({"a": torch.ones(3, 2)}, ValueError, r"groups\['a'\] must be \[m\].*\[3, 2\]"),
        ({"a": torch.tensor([1.0, NAN])}, ValueError, r"groups\['a'\] must be finite, got nan"),
        ({"a": torch.tensor([1.0, -INF])}, ValueError, r"groups\['a'\] must be finite, got -inf"),
        ({"a": torch.ones(3, dtype=torch.int64)}, TypeError, r"groups\['a'\] must be float32"),
        ({"a": [0.1, 0.2]}, TypeError, r"groups\['a'\] must be a torch.Tensor, got list"),
        ({3: torch.ones(3)}, TypeError, "each name in groups must be a string, got int"),
    ],
)
def test_bad_groups_are_refused(bad, error, match):
    with pytest.raises(error, match=match):
        plots.plot_distance_distribution(bad)
    with pytest.raises(TypeError, match="title must be a string, got int"):
        plots.plot_distance_distribution({"a": torch.ones(3)}, title=3)


WORDS = ["Let", " x", " =", "4", "\n", " perimeter", "\t", " internationalization", "$y^2$", "\\frac", "", "\x00", " 答案", "}"]


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")  # no Chinese in matplotlib's own font
@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (5, 3), (14, 2), (50, 50), (20, 50)])
def test_pairs_show_their_tokens(students, teachers, tmp_path):
    generator = torch.Generator().manual_seed(1)
    mass = torch.rand(students, teachers, generator=generator) ** 6 + 1e-6
    sides = [(WORDS * 4)[start : start + size] for start, size in ((0, students), (1, teachers))]
    figure = plots.plot_window_pair(pair(mass.tolist()), 0, *sides)
    check_picture(figure, tmp_path / "pair.png")
    texts = written(figure)
    assert {"student", "teacher", "window pair 0: distance 0.250"} <= set(texts)
    changed = {
        " perimeter": "␣perimeter",
        "\n": "↵",
        "\t": "⇥",
        " internationalization": "␣internationa…",
        "": "∅",
        "\x00": "\\x00",
    }
    expected = [changed.get(word, word.replace(" ", "␣")) for side in sides for word in side]
    assert [text for text in texts if text in expected] == expected


def test_a_link_is_drawn_where_the_plan_has_mass(tmp_path):
    """Blue between the same texts, vermilion between others, and the picture changes there and nowhere else."""
    words = ["a", "b", "c"]
    base = picture(plots.plot_window_pair(pair(torch.eye(3).tolist()), 0, words, words), tmp_path / "base.png")
    moved = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]).tolist()
    crossed = picture(plots.plot_window_pair(pair(moved), 0, words, ["a", "d", "e"]), tmp_path / "crossed.png")
    blue = (base[..., 2] - base[..., 0] > 0.4).sum()
    assert blue > 3 * (crossed[..., 2] - crossed[..., 0] > 0.4).sum() / 2
    assert not (base[..., 0] - base[..., 2] > 0.4).any()
    assert (crossed[..., 0] - crossed[..., 2] > 0.4).sum() > 1000
    between = slice(base.shape[0] // 3, base.shape[0] // 2)
    first = slice(0, base.shape[1] // 2 - 100)
    assert torch.equal(base[between, first], crossed[between, first])
    assert not torch.equal(base[between], crossed[between])


def links(figure):
    (drawn,) = figure.axes[0].collections
    ends = [tuple(round(x, 2) for x, _ in path.vertices[[0, -1]]) for path in drawn.get_paths()]
    return ends, drawn.get_linewidths(), drawn.get_alpha(), drawn.get_edgecolors()


def test_links_follow_the_mass():
    """Shares 1, 0.5 and 0.06 are drawn, the heaviest last; 0.04 is left out, which the figure says."""
    plan = [[0.5, 0.0, 0.04], [0.0, 1.0, 0.06]]
    figure = plots.plot_window_pair(pair(plan), 0, ["a", "b"], ["a", "c", "b"], title="a step")
    ends, widths, alphas, _ = links(figure)
    columns = sorted({x for link in ends for x in link})
    assert [(columns.index(a), columns.index(b)) for a, b in ends] == [(1, 2), (0, 0), (1, 1)]
    assert list(widths) == sorted(widths)
    assert list(alphas) == sorted(alphas)
    assert alphas[-1] <= 1
    texts = written(figure)
    assert "links under 5 % of the heaviest are left out: 2.5 % of the mass" in texts  # 0.04 / 1.6
    assert {"a step: distance 0.250", "same text", "different text"} <= set(texts)
    whole = written(plots.plot_window_pair(pair([[1.0]]), 0, ["a"], ["a"]))
    assert "same text" in whole
    assert not any(text.startswith(("links", "different")) for text in whole)


def test_lengths_end_the_window():
    """By default where the mass ends; texts past it may be given, and are not shown."""
    plan = torch.zeros(4, 5)
    plan[:2, :3] = torch.rand(2, 3) + 0.1
    transport, students, teachers = pair(plan.tolist()), list("abcd"), list("vwxyz")
    for given in ((students, teachers), (students[:2], teachers[:3])):
        texts = written(plots.plot_window_pair(transport, 0, *given))
        assert [text for text in texts if len(text) == 1] == list("abvwx")
        texts = written(plots.plot_window_pair(transport, 0, *given, student_length=2, teacher_length=3))
        assert [text for text in texts if len(text) == 1] == list("abvwx")
    texts = written(plots.plot_window_pair(transport, 0, students[:3], teachers, student_length=3, teacher_length=5))
    assert [text for text in texts if len(text) == 1] == list("abcvwxyz")


def test_a_plan_of_the_solver(tmp_path):
    student, teacher = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[2, 1, 3], [8, 9, 4]])
    lengths = {"student_lengths": torch.tensor([3, 4]), "teacher_lengths": torch.tensor([3, 3])}
    transport = topd.near_future_divergence(student, teacher, torch.randn(10, 16), **lengths)
    for index in range(2):
        given = [[f" t{token}" for token in side[index].tolist()] for side in (student, teacher)]
        figure = plots.plot_window_pair(transport, index, *given)
        check_picture(figure, tmp_path / f"{index}.png")
    assert links(plots.plot_window_pair(transport, 0, ["a", "b", "c"], ["b", "a", "c"]))[0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"transport": torch.ones(1, 2, 2)}, TypeError, "transport must be a topd.Transport, got Tensor"),
        ({"index": 1}, ValueError, r"index must be an int in \[0, 1\).*got 1"),
        ({"index": -1}, ValueError, "index must be an int"),
        ({"index": True}, ValueError, "index must be an int"),
        ({"student_tokens": "ab"}, TypeError, "student_tokens must be a list of strings"),
        ({"teacher_tokens": [1, 2]}, TypeError, "teacher_tokens must be a list of strings"),
        ({"student_tokens": ["a"]}, ValueError, "student_tokens must hold 2 texts.*got 1"),
        ({"teacher_tokens": ["a"] * 3}, ValueError, "teacher_tokens must hold 2 texts.*got 3"),
        ({"student_length": 1}, ValueError, r"student_length must lie in \[2, 2\].*got 1"),
        ({"teacher_length": 3}, ValueError, r"teacher_length must lie in \[2, 2\].*got 3"),
        ({"teacher_length": 2.0}, TypeError, "teacher_length must be an int"),
        ({"transport": pair([[0.5, NAN], [0.0, 0.5]])}, ValueError, "transport.plan must be finite"),
        ({"transport": pair([[0.5, -0.1], [0.0, 0.6]])}, ValueError, "transport.plan must be finite, >= 0"),
        ({"transport": topd.Transport(torch.zeros(1), torch.zeros(1, 2, 2), torch.zeros(1))}, ValueError, "not all 0"),
        ({"title": 3}, TypeError, "title must be a string"),
    ],
)
def test_bad_pairs_are_refused(change, error, match):
    good = {"transport": pair([[0.5, 0.0], [0.0, 0.5]]), "index": 0, "student_tokens": ["a", "b"], "teacher_tokens": ["a", "b"]}
    plots.plot_window_pair(**good)
    with pytest.raises(error, match=match):
        plots.plot_window_pair(**(good | change))


def run(code):
    """What a fresh interpreter that sees only the package prints."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_matplotlib_is_loaded_by_the_first_figure_and_pyplot_never():
    output = run(
        "import torch, topd, topd.plots\n"
        "print('matplotlib' in sys.modules)\n"
        "topd.plots.plot_distance_distribution({'a': torch.rand(9)}).savefig('/dev/null', format='png')\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    assert output == "False\nTrue False\n"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plots.plot_distance_distribution({"a": torch.ones(3)}),
        lambda: plots.plot_window_pair(pair([[1.0]]), 0, ["a"], ["a"]),
    ):
        with pytest.raises(ImportError, match=r'pip install "topd\[plots\]"'):
            draw()
