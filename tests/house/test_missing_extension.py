"""Without a C++ extension that loads: imports are quiet, one warning at the first CPU call that names no backend."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import topd
from topd.backends import _load_cpp

PACKAGE = Path(topd.__file__).parent


def loss(**options):
    hidden, head = torch.randn(3, 4), topd.Head(torch.randn(5, 4))
    return topd.linear_divergence(hidden, head, hidden + 1, head, **options)


def said(call) -> list[warnings.WarningMessage]:
    """Every warning of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


def test_the_first_cpu_call_that_names_no_backend_warns_once(without_extension):
    assert not said(lambda: loss(backend="eager"))
    assert not said(lambda: loss(backend="reference"))
    (warning,) = said(loss)
    assert warning.category is UserWarning
    assert str(warning.message) == without_extension
    assert "\n" not in without_extension
    assert warning.filename == __file__  # the caller's line, not one of topd's
    assert not said(loss)
    assert not said(lambda: topd.linear_logprobs(torch.randn(2, 4), topd.Head(torch.randn(5, 4)), torch.zeros(2, 1).long()))


def test_every_entry_that_chooses_a_backend_warns(without_extension):
    hidden, head, tokens = torch.randn(2, 4), topd.Head(torch.randn(5, 4)), torch.tensor([[0, 1], [2, 3]])
    for call in (
        lambda: topd.linear_logprobs(hidden, head, tokens),
        lambda: topd.near_future_divergence(tokens, tokens, torch.eye(5)),
        lambda: topd.score_tokens(hidden, head, hidden, head),
    ):
        sys.modules["topd.backends"]._warn_once.cache_clear()
        assert [str(each.message) for each in said(call)] == [without_extension]


def test_compiling_without_graph_breaks_warns_too(without_extension):
    torch._dynamo.reset()
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)

    def value(hidden, weight):
        return topd.linear_divergence(hidden, topd.Head(weight), hidden + 1, topd.Head(weight)).sum()

    compiled = torch.compile(value, fullgraph=True, backend="eager")
    results = []
    caught = said(lambda: results.append(compiled(hidden, weight)))
    assert [str(each.message) for each in caught if "topd" in str(each.message)] == [without_extension]
    assert torch.equal(results[0], value(hidden, weight))
    torch._dynamo.reset()


def test_nothing_to_warn_of_where_no_build_runs_on_the_processor(without_extension, monkeypatch):
    monkeypatch.setattr(sys.modules["topd.backends"], "_variants", list)
    assert not said(loss)


def test_a_library_that_does_not_load_is_named_with_the_remedy(tmp_path):
    for name in ("_cpp_avx512.so", "_cpp_avx2.so"):
        (tmp_path / name).write_text("built for another torch")
    broken = _load_cpp(tmp_path, ["avx512", "avx2"])
    assert not broken
    assert "\n" not in broken.detail
    for word in (
        "_cpp_avx512.so does not load",
        "_cpp_avx2.so does not load",
        f"against torch {torch.__version__}",
        "pip install",
    ):
        assert word in broken.detail
    absent = _load_cpp(tmp_path, ["default"])
    assert "was not built" in absent.detail
    assert "TOPD_BUILD_CPP=1 pip install" in absent.detail
    assert "no build" not in _load_cpp(tmp_path, []).detail


def fresh(folder: Path, *, libraries: dict[str, str | Path], code: str) -> subprocess.CompletedProcess[str]:
    """What an interpreter prints that sees a copy of the package with these libraries."""
    shutil.copytree(PACKAGE, folder / "topd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, content in libraries.items():
        if isinstance(content, Path):
            shutil.copy(content, folder / "topd" / name)
        else:
            (folder / "topd" / name).write_text(content)
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "error::UserWarning"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_importing_is_quiet_and_the_first_call_is_not(tmp_path):
    code = (
        "import torch, topd\nprint('imported')\nx = torch.zeros(1, 2)\ntopd.linear_divergence(x, topd.Head(x), x, topd.Head(x))"
    )
    done = fresh(tmp_path, libraries={}, code=code)
    assert done.stdout == "imported\n"
    assert 'UserWarning: topd runs CPU calls on its slower backend "eager": the C++ extension was not built' in done.stderr


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not list(PACKAGE.glob("_cpp_avx2.*")), reason="needs both variants"
)
def test_the_other_variant_is_taken_where_the_best_does_not_load(tmp_path):
    (good,) = PACKAGE.glob("_cpp_avx2.*")
    libraries = {"_cpp_avx512.so": "broken", good.name: good}
    done = fresh(tmp_path, libraries=libraries, code="import topd; print(topd.backends()['cpp'])")
    assert done.stdout.startswith(f"cpp: available, {good.name}")
