"""Building and packaging: setup.py with compilers that fail, what the sdist holds, the version, what `import topd` shows."""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

import topd

ROOT = Path(__file__).parents[2]
LIBRARIES = ("_cpp_avx2", "_cpp_avx512")
# A compiler of which only the AVX-512 flags fail: it writes empty objects and libraries.
FAKE_COMPILER = """#!/bin/sh
case "$*" in *-mavx512f*) echo "unknown option -mavx512f" >&2; exit 1;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o|-MF) : > "$2"; shift;; esac
  shift
done
"""


def copy_of(folder: Path, *names: str) -> Path:
    """These files and folders of the tree, without what was built there."""
    for name in names:
        source, place = ROOT / name, folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, place)
    return folder


def setup(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TOPD_BUILD_CPP", "PYTHONPATH")}
    command = [sys.executable, "setup.py", "-q", *words]
    return subprocess.run(command, cwd=folder, env=inherited | variables, capture_output=True, text=True, check=False)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copy_of(
        tmp_path / "clone", "setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "python_api", "topd_kernels"
    )


def built(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (folder / "out").rglob("_cpp_*"))


BUILD = ("build_ext", "--build-lib", "out", "--build-temp", "objects")
NONE = {"CC": "/nonexistent", "CXX": "/nonexistent"}
x86_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="two variants are an x86 matter")


@x86_only
def test_without_a_compiler_the_package_is_built_without_the_extension_and_says_so_last(sources):
    done = setup(sources, *BUILD, **NONE)
    assert done.returncode == 0, done.stderr
    assert built(sources) == []
    last = done.stderr.splitlines()[-1]
    for word in ("topd: not built", *LIBRARIES, '"eager"', "compiler", "TOPD_BUILD_CPP=1", "0 skips"):
        assert word in last


@x86_only
def test_a_variant_that_builds_is_kept_where_the_other_fails(sources):
    compiler = sources / "g++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    stale = sources / "out" / "topd" / f"_cpp_avx512{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    done = setup(sources, *BUILD, CC=str(compiler), CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert built(sources) == ["_cpp_avx2"]
    assert "topd: not built: topd._cpp_avx512 (see above)" in done.stderr.splitlines()[-1]


def test_a_build_that_was_asked_for_ends_the_installation(sources):
    done = setup(sources, *BUILD, TOPD_BUILD_CPP="1", **NONE)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: topd: the C++ extension could not be built")
    assert "TOPD_BUILD_CPP=0" in last


def test_a_build_that_was_not_wanted_is_skipped(sources):
    done = setup(sources, *BUILD, TOPD_BUILD_CPP="0", **NONE)
    assert (done.returncode, done.stderr, built(sources)) == (0, "", [])


def test_an_installation_holds_the_demo_and_its_page(sources):
    done = setup(sources, "build_py", "--build-lib", "out", TOPD_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    demo = ROOT / "python_api" / "topd_demo"
    files = {path.name for path in (sources / "out" / "topd_demo").iterdir()}
    assert files == {path.name for path in demo.iterdir() if path.is_file()} >= {"command.py", "page.html"}


def test_another_wish_is_refused_in_one_line(sources):
    done = setup(sources, *BUILD, TOPD_BUILD_CPP="yes")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "TOPD_BUILD_CPP must be 0 (skip the extension), 1 (it must build) or unset (try), got 'yes'" in done.stderr


def test_without_torch_the_installation_says_what_comes_first(sources):
    (sources / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    done = setup(sources, *BUILD, PYTHONPATH=str(sources))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "torch is not installed here" in done.stderr


def test_make_demands_the_extension():
    assert re.search(r"^export TOPD_BUILD_CPP \?= 1$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_sdist_holds_every_file_of_the_repository(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    folder = copy_of(tmp_path / "clone", *names)
    done = setup(folder, "sdist", TOPD_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").glob("topd-*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {member.name.partition("/")[2] for member in file.getmembers()}
    assert set(names) - packed == set()
    assert {"tests/conftest.py", "tests/compare.py", "CHANGELOG.md"} <= packed


def test_numpy_is_a_dependency():
    """torch without it warns when it is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"numpy\b", each) for each in project["dependencies"])


def test_the_version_is_that_of_the_installed_package(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: asked.append(name) or "9.8.7")
    assert topd._version() == "9.8.7"
    assert asked == ["topd"]


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert topd._version() == "0+source"
    assert isinstance(topd.__version__, str)


def test_dir_shows_the_public_names_alone():
    assert dir(topd) == sorted([*topd.__all__, "__version__"])
    for name in ("plots", "integrations.rollouts", "ops.linear_divergence", "checks"):
        assert importlib.import_module(f"topd.{name}")
    assert dir(topd) == sorted([*topd.__all__, "__version__"])


CLONE = Path(sysconfig.get_path("purelib"), "topd-clone.pth")


@pytest.mark.skipif(not CLONE.exists(), reason="this environment was not set up by make")
def test_a_folder_named_topd_does_not_shadow_the_package(tmp_path):
    (tmp_path / "topd").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import topd; print(topd.linear_divergence.__name__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "linear_divergence\n", done.stderr
