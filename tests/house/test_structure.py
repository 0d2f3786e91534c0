"""The house: imports go one way and never in a circle, the listed packages are the tree's, importing changes nothing."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python_api" / "topd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"topd": PACKAGE, "topd_kernels": ROOT / "topd_kernels"} | {
    name: ROOT / "python_api" / name for name in ("topd_bench", "topd_demo")
}

# From the ground up. A module imports modules of its own line and of the lines below; the longest prefix that fits decides.
LAYERS = (
    ("topd.options", "topd.checks", "topd.logits", "topd.files", "topd.memory", "topd.ops.shared.collectives"),
    ("topd.models.fsdp2_state", "topd.models.output_layer", "topd.models.head_from_model", "topd.models.verify_head"),
    ("topd.vocab_shard",),
    ("topd.products", "topd.head", "topd.divergences", "topd.scores", "topd.backends"),
    ("topd.ops.shared",),
    ("topd.ops",),
    ("topd.losses",),
    ("topd.near_future", "topd.plots", "topd.models", "topd.costs"),
    ("topd.branching",),
    ("topd.objectives",),
    ("topd.trd", "topd.profiling"),
    ("topd.integrations",),
    ("topd",),
    ("topd.cli.errors", "topd.cli.options"),
    ("topd_demo",),
    ("topd_bench",),
    ("topd.cli",),
)
HOSTS = {"transformers", "trl", "peft", "accelerate", "megatron", "verl", "tensordict"}
# What may know a host's package; all others meet them as objects that they are given.
KNOWS_HOSTS = (
    "topd.models",
    "topd.branching",
    "topd.integrations",
    "topd.trd.from_model",
    "topd.cli.doctor",
    "topd.cli.refine",
    "topd.costs.shapes",
    "topd_bench",
    "topd_demo",
)


def imported(path: Path) -> set[str]:
    """Return every module that a file names in an import, wherever it stands: `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@cache
def modules() -> dict[str, Path]:
    """Return every module of the packages by its dotted name."""
    by_name = {}
    for package, folder in FOLDERS.items():
        for path in sources(folder):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            by_name[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return by_name


@cache
def graph() -> dict[str, set[str]]:
    """Return which modules of the packages each of them imports. `import topd` of a subcommand counts; a package that is only
    passed through on the way to a module of it does not."""
    known = modules()
    edges = {}
    for name, path in known.items():
        named = imported(path) & set(known)
        passed = {other for other in named if any(each.startswith(other + ".") for each in named)}
        edges[name] = named - passed - {name}
    return edges


def layer(module: str) -> int:
    """Return how high a module stands."""
    fitting = [
        (len(prefix), height) for height, line in enumerate(LAYERS) for prefix in line if f"{module}.".startswith(f"{prefix}.")
    ]
    return max(fitting)[1]


def upward_imports() -> set[tuple[str, str]]:
    here = {name for name in graph() if not name.startswith("topd_kernels")}
    return {(name, other) for name in here for other in graph()[name] & here if layer(other) > layer(name)}


def circles() -> list[list[str]]:
    """Return each module that can be reached from itself, with the way."""
    edges, done = graph(), set()
    ways = []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            ways.append([*way[way.index(name) :], name])
            return
        if name in done:
            return
        for other in sorted(edges[name]):
            visit(other, [*way, name])
        done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return ways


def test_the_graph_has_what_everyone_can_see():
    edges = graph()
    assert "topd.ops.linear_divergence.spec" in edges["topd.losses.linear_divergence"]
    assert "topd_kernels.register" in modules()


def test_no_module_imports_one_above_it():
    assert not upward_imports()


def test_no_module_imports_itself_by_a_detour():
    assert not circles()


@pytest.mark.parametrize("name", sorted(name for name in modules() if not name.startswith(KNOWS_HOSTS)))
def test_only_those_who_meet_a_host_know_its_package(name):
    assert not roots(modules()[name]) & HOSTS


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.startswith("topd.ops.")))
def test_ops_know_torch_alone(name):
    assert roots(modules()[name]) <= set(sys.stdlib_module_names) | {"torch", "topd"}


def test_kernels_leave_matrix_products_to_torch():
    """Triton 3.6 and 3.7 are known to fault on Hopper in kernels with several `tl.dot`; the one that had them is gone."""
    kernels = [path for path in sources(ROOT / "topd_kernels") if "@triton.jit" in path.read_text()]
    assert len(kernels) > 10
    assert [path for path in kernels if re.search(r"\btl\.dot\w*\(", path.read_text())] == []


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
    declared = {name for path in sources(PACKAGE / "ops") for name in re.findall(r'define\(\s*"topd::(\w+)"', path.read_text())}
    assert {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} <= declared


def test_a_header_of_one_op_stands_beside_it():
    """csrc/shared holds what several ops include, be it through another header."""
    csrc = ROOT / "csrc"
    files = [path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h")]
    included = {
        path: {(path.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', path.read_text())} for path in files
    }

    def reach(path: Path) -> set[Path]:
        return {path}.union(*(reach(other) for other in included[path]))

    ops = [reach(path) for path in (csrc / "cpu").glob("*.cpp")]
    for header in (path for path in files if path.suffix == ".h"):
        users = sum(header in op for op in ops)
        assert (users == 1) == (header.parent.name == "cpu"), f"{header.name} is used by {users} ops"


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
