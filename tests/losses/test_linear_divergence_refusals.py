"""What linear_divergence and score_tokens refuse, before any work."""

import math

import pytest
import torch
from refusals import Refusal, assert_refused
from refused_calls import H, N, V, call, f32, grad, head, scored

import topd

OPTIONS: dict[str, Refusal] = {
    "unknown divergence": (lambda: call(divergence="kl"), ValueError, ["divergence", "'reverse_kl'", "'kl'"]),
    "divergence type": (lambda: call(divergence=topd.JSD), TypeError, ["divergence", "topd.JSD(0.5)", "got"]),
    "unknown backend": (lambda: call(backend="cuda"), ValueError, ["backend", "'eager'", "'cuda'"]),
    "backend type": (lambda: call(backend=1), TypeError, ["backend", "'eager'", "int"]),
    "temperature 0": (lambda: call(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    "temperature inf": (lambda: call(temperature=math.inf), ValueError, ["temperature", "finite", "inf"]),
    "temperature type": (lambda: call(temperature=f32(1)), TypeError, ["temperature", "number", "Tensor"]),
    "hard_weight negative": (
        lambda: call(hard_weight=-1.0, tokens=f32(N).long()),
        ValueError,
        ["hard_weight", ">= 0", "-1.0"],
    ),
    "hard_weight alone": (lambda: call(hard_weight=0.5), ValueError, ["hard_weight", "tokens", "None", "pass them"]),
    "return_scores": (lambda: call(return_scores=1), TypeError, ["return_scores", "True or False", "1"]),
    "workspace 0": (
        lambda: call(workspace_bytes=0),
        ValueError,
        ["workspace_bytes", "> 0", "0", "None for the default"],
    ),
    "workspace type": (lambda: call(workspace_bytes=1e6), TypeError, ["workspace_bytes", "int", "float"]),
    "workspace small": (
        lambda: call(workspace_bytes=40, backend="eager"),
        ValueError,
        ["workspace_bytes", "at least one row", "40", "raise it"],
    ),
}

TENSORS: dict[str, Refusal] = {
    "student no head": (
        lambda: call(student=f32(V, H)),
        TypeError,
        ["student", "topd.Head", "Tensor", "topd.Head(weight)"],
    ),
    "teacher no head": (lambda: call(teacher=None), TypeError, ["teacher", "topd.Head", "NoneType"]),
    "hidden no tensor": (lambda: call(student_hidden=[0.0]), TypeError, ["student_hidden", "Tensor", "list"]),
    "hidden int": (
        lambda: call(student_hidden=f32(N, H).int()),
        TypeError,
        ["student_hidden", "float32", "int32", "cast"],
    ),
    "hidden width": (
        lambda: call(student_hidden=f32(N, 9)),
        ValueError,
        ["student_hidden", f"{H}]", "student.weight", f"[{N}, 9]"],
    ),
    "teacher width": (lambda: call(teacher_hidden=f32(N, 9)), ValueError, ["teacher_hidden", f"{H}]", f"[{N}, 9]"]),
    "hidden dtype": (
        lambda: call(student_hidden=f32(N, H).half()),
        ValueError,
        ["student_hidden", "student.weight", "share a dtype", "float16", "float32", "cast", "torch.autocast"],
    ),
    "teacher dtype": (
        lambda: call(teacher_hidden=f32(N, H).double()),
        ValueError,
        ["teacher_hidden", "teacher.weight", "share a dtype", "float64", "cast"],
    ),
    "teacher rows": (
        lambda: call(teacher_hidden=f32(N + 1, H)),
        ValueError,
        ["teacher_hidden", f"[{N}, {H}]", f"[{N + 1}, {H}]"],
    ),
    "teacher rank": (
        lambda: call(teacher_hidden=f32(1, N, H)),
        ValueError,
        ["teacher_hidden", f"[{N}, {H}]", f"[1, {N}, {H}]"],
    ),
    "weight device": (
        lambda: call(student=topd.Head(f32(V, H).to("meta"))),
        ValueError,
        ["student.weight", "meta", "student_hidden", "cpu", "move"],
    ),
    "teacher device": (
        lambda: call(teacher_hidden=f32(N, H).to("meta"), teacher=topd.Head(f32(V, H).to("meta"))),
        ValueError,
        ["teacher_hidden", "meta", "student_hidden", "cpu", "move"],
    ),
    "mask no tensor": (lambda: call(mask=[True] * N), TypeError, ["mask", "Tensor", "list"]),
    "mask int": (lambda: call(mask=f32(N).long()), TypeError, ["mask", "torch.bool", "torch.int64", "cast"]),
    "mask shape": (lambda: call(mask=f32(N, 1).bool()), ValueError, ["mask", f"[{N}]", f"[{N}, 1]", "student_hidden"]),
    "mask device": (lambda: call(mask=f32(N).bool().to("meta")), ValueError, ["mask", "meta", "cpu", "move"]),
    "tokens int32": (lambda: call(tokens=f32(N).int()), TypeError, ["tokens", "torch.int64", "torch.int32", "cast"]),
    "tokens shape": (lambda: call(tokens=f32(N + 1).long()), ValueError, ["tokens", f"[{N}]", f"[{N + 1}]"]),
    "hint int": (lambda: call(weights_hint=f32(N).long()), TypeError, ["weights_hint", "float32", "int64"]),
    "hint shape": (lambda: call(weights_hint=f32(1)), ValueError, ["weights_hint", f"[{N}]", "[1]"]),
    "teacher hidden grad": (
        lambda: call(teacher_hidden=grad(N, H)),
        ValueError,
        ["teacher_hidden", "require grad", "constant", "detach()"],
    ),
    "teacher weight grad": (
        lambda: call(teacher=topd.Head(grad(V, H))),
        ValueError,
        ["teacher.weight", "require grad", "constant", "head.detach()"],
    ),
    "teacher bias grad": (lambda: call(teacher=head(bias=grad(V))), ValueError, ["teacher.bias", "head.detach()"]),
    "teacher adapter grad": (
        lambda: call(teacher=head(adapter=topd.LowRank(grad(2, H), f32(V, 2), 1.0))),
        ValueError,
        ["teacher.adapter", "head.detach()"],
    ),
    "scores no head": (lambda: scored(teacher=f32(V, H)), TypeError, ["teacher", "topd.Head", "Tensor"]),
    "scores hidden": (lambda: scored(student_hidden=None), TypeError, ["student_hidden", "Tensor", "NoneType"]),
    "scores mask": (lambda: scored(mask=f32(N)), TypeError, ["mask", "torch.bool", "torch.float32"]),
    "scores temperature": (lambda: scored(temperature=-1), ValueError, ["temperature", "> 0", "-1"]),
}
REFUSALS = OPTIONS | TENSORS


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)


@pytest.mark.parametrize("token", [-1, V, 10_000])
@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
def test_tokens_outside_the_common_vocabulary_are_refused_on_the_cpu(token, hard_weight, backend):
    """The vocabulary is the smaller one; the same token in a masked row is not read."""
    # Not on a GPU, where the check would stall the stream: such a token has log-probability -inf there.
    tokens, teacher = torch.tensor([0, 1, token, 2]), topd.Head(f32(V + 3, H))
    with pytest.raises(ValueError, match=rf"tokens must lie in \[0, {V}\).*got {token}.*mask"):
        call(tokens=tokens, teacher=teacher, hard_weight=hard_weight, backend=backend)
    mask = torch.tensor([True, True, False, True])
    value = call(tokens=tokens, teacher=teacher, hard_weight=hard_weight, backend=backend, mask=mask)
    assert value.isfinite().all()
