"""The ops' contracts: arguments have names, what producer and consumer agree on is said once, the kernels may be absent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import topd

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "python_api" / "topd" / "ops", ROOT / "topd_kernels")
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


def is_number(node: ast.expr | None) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) is int


def flat_names(function: ast.AST) -> set[str]:
    """Return the names that stand for flat lists of arguments in a function: its starred parameter, and what is usual."""
    names = {"flat", "args", "inputs", "arguments", "outputs", "output", "common"}
    if isinstance(function, (ast.FunctionDef, ast.Lambda)) and function.args.vararg is not None:
        names.add(function.args.vararg.arg)
    return names


def numbered(source: str) -> list[str]:
    """Return every subscript or slice by a number, also in a sum such as 3 + N, into a flat list of arguments."""
    bad = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.Lambda, ast.Module)):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)):
                continue
            index = node.slice
            parts = [index.lower, index.upper] if isinstance(index, ast.Slice) else [index]
            by_place = any(is_number(each) for part in parts if part is not None for each in ast.walk(part))
            by_count = isinstance(index, ast.Slice) and any(part is not None for part in parts)
            if node.value.id in flat_names(function) and (by_place or by_count):
                bad.append(ast.unparse(node))
    return bad


@pytest.mark.parametrize(
    "source",
    [
        "def f(*flat): return flat[14:22]",
        "def f(*flat): return flat[3 + N : 14 + N]",
        "def fake(x, *rest): return rest[5]",
        "def fake(*args): return args[-1]",
        "def setup(ctx, inputs, output): ctx.hint = inputs[25] is None",
        "def f(*flat): return flat[:N_COMMON]",
    ],
)
def test_an_index_into_flat_arguments_is_found(source):
    assert numbered(source)


def test_other_subscripts_are_none():
    assert not numbered("def f(*flat, x=0): return x[0], flat, named['scale'], x.shape[1], flat_name[0]")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_index_by_number_into_flat_arguments(path):
    assert not numbered(path.read_text())


WITHOUT_KERNELS = """
import sys

class WithoutKernels:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "topd_kernels" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutKernels(finder) for finder in sys.meta_path]
sys.path.insert(0, FOLDER)
import torch, topd

torch.manual_seed(0)
tensors = [torch.randn(*shape) for shape in ((6, 4), (9, 4), (6, 3), (9, 3))]
hidden, weight, teacher_hidden, teacher_weight = (tensor.requires_grad_() for tensor in tensors)
student, teacher = topd.Head(weight), topd.Head(teacher_weight.detach())
value = topd.linear_divergence(hidden, student, teacher_hidden.detach(), teacher, backend=BACKEND)
logprobs, entropy = topd.linear_logprobs(hidden, student, torch.arange(12).view(6, 2) % 9, return_entropy=True, backend=BACKEND)
(value.sum() + logprobs.sum() + entropy.sum()).backward()
assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
assert not [name for name in sys.modules if name.startswith("topd_kernels")]
print([name for name, backend in topd.backends().items() if backend])
"""


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_topd_runs_where_topd_kernels_is_absent(backend):
    if not topd.backends()[backend]:
        pytest.skip(topd.backends()[backend].detail)
    code = f"FOLDER, BACKEND = {str(ROOT / 'python_api')!r}, {backend!r}\n{WITHOUT_KERNELS}"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert backend in run.stdout
    assert "triton" not in run.stdout
