"""Files stay under 300 lines, functions under 60 without their docstrings; test modules share by helper modules alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("python_api", "topd_kernels", "bench", "quality", "tools", "examples")
SUFFIXES = (".py", ".h", ".cpp")

LONG_FILES = {"tests/kernels/test_triton_logprob_rows.py"}
# A Triton kernel whose parameters alone take twenty lines: a helper of its own would be called with as many.
LONG_FUNCTIONS = {"topd_kernels/divergence_rows/kernels.py: sweep"}


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def lines_of(function: ast.FunctionDef) -> int:
    """Return a function's length without its docstring."""
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if is_text else 0)


def test_no_file_is_longer_than_300_lines():
    long = {name_of(path) for path in files(*CODE, "csrc", "tests") if len(path.read_text().splitlines()) > 300}
    assert long == LONG_FILES


def test_no_function_is_longer_than_60_lines():
    long = set()
    for path in files(*CODE):
        if path.suffix == ".py":
            functions = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef))
            long |= {f"{name_of(path)}: {node.name}" for node in functions if lines_of(node) > 60}
    assert long == LONG_FUNCTIONS


def test_no_test_module_imports_another():
    for path in files("tests"):
        for node in ast.walk(tree_of(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0].startswith("test_")], name_of(path)


def test_results_are_named_by_what_they_are():
    """No variable, argument or function is called found, made or at."""
    nameless = {"found", "made", "at"}
    for path in (path for path in files(*CODE, "tests") if path.suffix == ".py"):
        for node in ast.walk(tree_of(path)):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            assert name not in nameless, f"{name_of(path)}, line {node.lineno}: {name}"
