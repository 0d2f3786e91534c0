"""The house: imports go one way, the listed packages are the tree's, importing changes nothing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python_api" / "topd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPS_MAY_KNOW = {"backends", "checks", "divergences", "head", "ops", "plan", "reference", "repeats", "row_math", "scores"}


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands: `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_there_is_something_to_look_at():
    assert {"linear_divergence.py", "__init__.py"} <= {path.name for path in sources(PACKAGE / "ops")}


@pytest.mark.parametrize("path", sources(PACKAGE / "ops"), ids=lambda path: path.name)
def test_ops_know_no_method_and_no_trainer(path):
    """An op's file imports the standard library, torch, the kernels and the modules below it."""
    within = {name.split(".")[1] for name in imported(path) if name.startswith("topd.")}
    assert within <= OPS_MAY_KNOW
    assert roots(path) <= set(sys.stdlib_module_names) | {"torch", "topd", "topd_kernels"}


@pytest.mark.parametrize("path", sources(PACKAGE / "objectives") or [None], ids=lambda path: path and path.name)
def test_methods_know_no_trainer(path):
    if path is None:
        pytest.skip("no objectives in this version")
    assert not {name for name in imported(path) if name.startswith(("topd.integrations", "topd.cli"))}
    assert not roots(path) & {"transformers", "trl", "peft", "accelerate"}


def test_kernels_do_not_know_the_package():
    """csrc knows ATen only, topd_kernels torch and triton only."""
    for path in sources(ROOT / "csrc", ROOT / "topd_kernels"):
        assert roots(path) <= set(sys.stdlib_module_names) | {"torch", "triton", "topd_kernels"}, path
    native = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".h")]
    for path in native:
        for include in re.findall(r"#\s*include\s*<([^>]+)>", path.read_text()):
            allowed = (
                include.startswith(("ATen/", "c10/"))
                or include == "torch/library.h"
                or re.fullmatch(r"\w+|sys/mman\.h|unistd\.h", include)
            )
            assert allowed, f"{path.name} includes {include}"


def test_each_native_source_has_the_stem_of_an_op():
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    assert {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} <= stems


def test_listed_packages_are_those_of_the_tree():
    settings = PROJECT["tool"]["setuptools"]
    tree = set()
    for name, folder in settings["package-dir"].items():
        base = ROOT / folder
        packages = (path.parent.relative_to(base).parts for path in base.rglob("__init__.py"))
        tree |= {".".join((name, *parts)) for parts in packages}
    assert set(settings["packages"]) == tree
    folders = {path.parent for path in sources(PACKAGE)}
    assert all((folder / "__init__.py").exists() for folder in folders)


def run(code: str) -> str:
    """What a fresh interpreter that sees only the package prints."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_changes_no_environment_and_no_setting_of_torch():
    output = run(
        "import os, torch, warnings\n"
        "def state():\n"
        "    of_torch = torch.get_num_threads(), torch.get_default_dtype(), torch.nn.functional.kl_div\n"
        "    return dict(os.environ), warnings.filters[:], torch.are_deterministic_algorithms_enabled(), *of_torch\n"
        "before = state()\n"
        "import topd\n"
        "print(before == state())\n"
    )
    assert output == "True\n"


def test_importing_loads_no_trainer_and_writes_nothing():
    output = run(
        "import torch, topd\n"
        "print(sorted({'transformers', 'trl', 'peft', 'triton', 'scipy', 'ot', 'datasets'} & set(sys.modules)))\n"
    )
    assert output == "[]\n"


def test_everything_public_is_there():
    import topd

    assert sorted(topd.__all__) == sorted(set(topd.__all__))
    assert all(hasattr(topd, name) for name in topd.__all__)
    primitives = {"linear_divergence", "score_tokens", "backends", "Head", "LowRank", "TokenScores"}
    divergences = {"ForwardKL", "ReverseKL", "JSD", "SkewKL", "SkewReverseKL", "TotalVariation"}
    assert primitives | divergences <= set(topd.__all__)
