"""Every refusal, before any work: its type, and a message with the argument, the rule or remedy, and what came."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import topd

N, V, H, M = 4, 6, 3, 2
NAN = math.nan


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def head(**options: Any) -> topd.Head:
    return topd.Head(f32(V, H), **options)


def call(**changes: Any) -> Any:
    """A good call of linear_divergence with some arguments exchanged."""
    sides = {"student_hidden": f32(N, H), "student": head(), "teacher_hidden": f32(N, H), "teacher": head()}
    return topd.linear_divergence(**(sides | changes))


def scored(**changes: Any) -> Any:
    """The same for score_tokens."""
    sides = {"student_hidden": f32(N, H), "student": head(), "teacher_hidden": f32(N, H), "teacher": head()}
    return topd.score_tokens(**(sides | changes))


def chosen(**changes: Any) -> Any:
    """A good call of linear_logprobs with some arguments exchanged."""
    good = {"hidden": f32(N, H), "head": head(), "ids": f32(N, M).long()}
    return topd.linear_logprobs(**(good | changes))


def top(**changes: Any) -> Any:
    """The same for topk_logprobs."""
    return topd.topk_logprobs(**({"hidden": f32(N, H), "head": head(), "k": 2} | changes))


def low_rank(*, rank: int = 2, width: int = H, vocab: int = V, dtype: torch.dtype = torch.float32) -> topd.LowRank:
    return topd.LowRank(torch.ones(rank, width, dtype=dtype), torch.ones(vocab, rank, dtype=dtype), 1.0)


def grad(*shape: int) -> torch.Tensor:
    return f32(*shape).requires_grad_()


Refusal = tuple[Callable[[], Any], type[Exception], list[str]]

CONSTRUCTION: dict[str, Refusal] = {
    "weight no tensor": (lambda: topd.Head([[1.0]]), TypeError, ["Head.weight", "Tensor", "list"]),
    "weight a module": (
        lambda: topd.Head(torch.nn.Linear(H, V)),
        TypeError,
        ["Head.weight", "Tensor", "module Linear", "use topd.Head.from_model(model)"],
    ),
    "weight int": (
        lambda: topd.Head(torch.ones(V, H, dtype=torch.int8)),
        TypeError,
        ["Head.weight", "float32", "int8"],
    ),
    "weight 1-D": (lambda: topd.Head(f32(V)), ValueError, ["Head.weight", "[V, H]", f"[{V}]"]),
    "weight empty": (lambda: topd.Head(f32(0, H)), ValueError, ["Head.weight", "[V, H]", f"[0, {H}]", "gather"]),
    "bias shape": (lambda: head(bias=f32(V + 1)), ValueError, ["Head.bias", f"[{V}]", f"[{V + 1}]"]),
    "bias dtype": (lambda: head(bias=f32(V).double()), ValueError, ["Head.bias", "float32", "float64", "cast"]),
    "bias no tensor": (lambda: head(bias=0.0), TypeError, ["Head.bias", "Tensor", "float"]),
    "bias device": (lambda: head(bias=f32(V).to("meta")), ValueError, ["Head.bias", "meta", "cpu", "move"]),
    "scale type": (lambda: head(scale="2"), TypeError, ["Head.scale", "number", "str"]),
    "scale nan": (lambda: head(scale=NAN), ValueError, ["Head.scale", "finite", "nan"]),
    "softcap zero": (lambda: head(softcap=0.0), ValueError, ["Head.softcap", "> 0", "0.0", "None means no softcap"]),
    "softcap negative": (lambda: head(softcap=-3), ValueError, ["Head.softcap", "> 0", "-3"]),
    "adapter type": (
        lambda: head(adapter=(f32(2, H), f32(V, 2))),
        TypeError,
        ["Head.adapter", "topd.LowRank", "tuple"],
    ),
    "adapter width": (
        lambda: head(adapter=low_rank(width=H + 1)),
        ValueError,
        ["Head.adapter.a", f"{H}]", f"{H + 1}]"],
    ),
    "adapter vocab": (
        lambda: head(adapter=low_rank(vocab=V + 1)),
        ValueError,
        ["Head.adapter.b", f"[{V},", f"[{V + 1},"],
    ),
    "rank": (
        lambda: topd.LowRank(f32(2, H), f32(V, 3), 1.0),
        ValueError,
        ["LowRank", "[r, H]", f"[2, {H}]", f"[{V}, 3]"],
    ),
    "rank 0": (lambda: low_rank(rank=0), ValueError, ["LowRank.a", "r >= 1", f"[0, {H}]", "None"]),
    "low-rank 1-D": (lambda: topd.LowRank(f32(H), f32(V, 1), 1.0), ValueError, ["LowRank", "[r, H]", f"[{H}]"]),
    "low-rank dtype": (
        lambda: topd.LowRank(f32(2, H), f32(V, 2).double(), 1.0),
        ValueError,
        ["LowRank.a", "LowRank.b", "share a dtype", "float32", "float64"],
    ),
    "low-rank int": (
        lambda: topd.LowRank(f32(2, H).long(), f32(V, 2), 1.0),
        TypeError,
        ["LowRank.a", "float32", "int64"],
    ),
    "low-rank device": (
        lambda: topd.LowRank(f32(2, H), f32(V, 2).to("meta"), 1.0),
        ValueError,
        ["LowRank.b", "meta", "move"],
    ),
    "scaling": (lambda: topd.LowRank(f32(2, H), f32(V, 2), None), TypeError, ["LowRank.scaling", "number", "NoneType"]),
    "clip negative": (lambda: topd.ForwardKL(-0.1), ValueError, ["entry_clip", ">= 0", "-0.1", "None means no clip"]),
    "clip type": (lambda: topd.ForwardKL("0.1"), TypeError, ["entry_clip", "number", "str"]),
    "beta 0": (lambda: topd.JSD(0), ValueError, ["beta", "> 0", "0", "topd.ForwardKL()", "topd.ReverseKL()"]),
    "beta 1": (lambda: topd.JSD(1.0), ValueError, ["beta", "< 1", "1.0", "topd.ForwardKL()", "topd.ReverseKL()"]),
    "beta nan": (lambda: topd.JSD(NAN), ValueError, ["beta", "finite", "nan"]),
    "beta bool": (lambda: topd.JSD(True), TypeError, ["beta", "number", "bool"]),
    "skew alpha 0": (lambda: topd.SkewKL(0.0), ValueError, ["alpha", "> 0", "0.0", "topd.ForwardKL()"]),
    "skew alpha 1": (lambda: topd.SkewKL(1.0), ValueError, ["alpha", "< 1", "1.0"]),
    "skew reverse alpha 0": (lambda: topd.SkewReverseKL(0.0), ValueError, ["alpha", "> 0", "0.0", "topd.ReverseKL()"]),
    "skew reverse alpha 1": (lambda: topd.SkewReverseKL(1.5), ValueError, ["alpha", "< 1", "1.5"]),
}
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
        ["student_hidden", "student.weight", "share a dtype", "float16", "float32", "cast"],
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
LOGPROBS: dict[str, Refusal] = {
    "ids no tensor": (lambda: chosen(ids=[[0, 1]] * N), TypeError, ["ids", "Tensor", "list"]),
    "ids missing": (lambda: chosen(ids=None), TypeError, ["ids", "Tensor", "NoneType"]),
    "ids int32": (lambda: chosen(ids=f32(N, M).int()), TypeError, ["ids", "torch.int64", "torch.int32", "cast"]),
    "ids float": (lambda: chosen(ids=f32(N, M)), TypeError, ["ids", "torch.int64", "torch.float32", "cast"]),
    "ids without M": (lambda: chosen(ids=f32(N).long()), ValueError, ["ids", "[..., M]", "hidden", f"[{N}]"]),
    "ids rank": (lambda: chosen(ids=f32(1, N, M).long()), ValueError, ["ids", "[..., M]", f"[{N}]", f"[1, {N}, {M}]"]),
    "ids rows": (lambda: chosen(ids=f32(N + 1, M).long()), ValueError, ["ids", f"[{N}, {M}]", "hidden", f"[{N + 1}, {M}]"]),
    "ids broadcast": (lambda: chosen(ids=f32(1, M).long()), ValueError, ["ids", f"[{N}, {M}]", f"[1, {M}]"]),
    "ids device": (
        lambda: chosen(ids=f32(N, M).long().to("meta")),
        ValueError,
        ["ids", "meta", "hidden", "cpu", "move"],
    ),
    "ids no head": (lambda: chosen(head=f32(V, H)), TypeError, ["head", "topd.Head", "Tensor", "topd.Head(weight)"]),
    "ids hidden no tensor": (lambda: chosen(hidden=[0.0]), TypeError, ["hidden", "Tensor", "list"]),
    "ids hidden int": (lambda: chosen(hidden=f32(N, H).int()), TypeError, ["hidden", "float32", "int32", "cast"]),
    "ids hidden width": (lambda: chosen(hidden=f32(N, 9)), ValueError, ["hidden", f"{H}]", "head.weight", f"[{N}, 9]"]),
    "ids hidden number": (lambda: chosen(hidden=torch.tensor(1.0)), ValueError, ["hidden", f"[..., {H}]", "[]"]),
    "ids hidden dtype": (
        lambda: chosen(hidden=f32(N, H).half()),
        ValueError,
        ["hidden", "head.weight", "share a dtype", "float16", "float32", "cast"],
    ),
    "ids weight device": (
        lambda: chosen(head=topd.Head(f32(V, H).to("meta"))),
        ValueError,
        ["head.weight", "meta", "hidden", "cpu", "move"],
    ),
    "ids temperature 0": (lambda: chosen(temperature=0), ValueError, ["temperature", "> 0", "got 0"]),
    "ids temperature nan": (lambda: chosen(temperature=NAN), ValueError, ["temperature", "finite", "nan"]),
    "ids temperature type": (lambda: chosen(temperature="1"), TypeError, ["temperature", "number", "str"]),
    "ids mask no tensor": (lambda: chosen(mask=[True] * N), TypeError, ["mask", "Tensor", "list"]),
    "ids mask int": (lambda: chosen(mask=f32(N).long()), TypeError, ["mask", "torch.bool", "torch.int64", "cast"]),
    "ids mask shape": (lambda: chosen(mask=f32(N, M).bool()), ValueError, ["mask", f"[{N}]", f"[{N}, {M}]", "hidden"]),
    "ids mask device": (lambda: chosen(mask=f32(N).bool().to("meta")), ValueError, ["mask", "meta", "cpu", "move"]),
    "ids hint int": (lambda: chosen(weights_hint=f32(N).long()), TypeError, ["weights_hint", "float32", "int64"]),
    "ids hint shape": (lambda: chosen(weights_hint=f32(N, M)), ValueError, ["weights_hint", f"[{N}]", f"[{N}, {M}]"]),
    "ids return_entropy": (lambda: chosen(return_entropy=1), TypeError, ["return_entropy", "True or False", "1"]),
    "ids return_entropy none": (lambda: chosen(return_entropy=None), TypeError, ["return_entropy", "True or False", "None"]),
    "ids workspace 0": (lambda: chosen(workspace_bytes=0), ValueError, ["workspace_bytes", "> 0", "None for the default"]),
    "ids workspace type": (lambda: chosen(workspace_bytes=1e6), TypeError, ["workspace_bytes", "int", "float"]),
    "ids workspace small": (
        lambda: chosen(workspace_bytes=20, backend="eager"),
        ValueError,
        ["workspace_bytes", "at least one row", "20", "raise it"],
    ),
    "ids unknown backend": (lambda: chosen(backend="cuda"), ValueError, ["backend", "'eager'", "'cuda'"]),
    "ids backend type": (lambda: chosen(backend=1), TypeError, ["backend", "'eager'", "int"]),
    "k 0": (lambda: top(k=0), ValueError, ["k", "> 0", "got 0"]),
    "k large": (lambda: top(k=V + 1), ValueError, ["k", "at most", f"{V} entries", f"got {V + 1}"]),
    "k type": (lambda: top(k=2.0), TypeError, ["k", "int", "float"]),
    "k bool": (lambda: top(k=True), TypeError, ["k", "int", "bool"]),
    "k no head": (lambda: top(head=f32(V, H)), TypeError, ["head", "topd.Head", "Tensor"]),
    "k hidden": (lambda: top(hidden=f32(N, 9)), ValueError, ["hidden", f"{H}]", "head.weight", f"[{N}, 9]"]),
    "k hidden dtype": (lambda: top(hidden=f32(N, H).double()), ValueError, ["hidden", "share a dtype", "float64", "cast"]),
    "k temperature": (lambda: top(temperature=-1.0), ValueError, ["temperature", "> 0", "-1.0"]),
    "k mask int": (lambda: top(mask=f32(N).int()), TypeError, ["mask", "torch.bool", "torch.int32", "cast"]),
    "k mask shape": (lambda: top(mask=f32(N + 1).bool()), ValueError, ["mask", f"[{N}]", f"[{N + 1}]", "hidden"]),
    "k workspace": (lambda: top(workspace_bytes=-1), ValueError, ["workspace_bytes", "> 0", "-1"]),
    "k workspace small": (lambda: top(workspace_bytes=20), ValueError, ["workspace_bytes", "at least one row", "20"]),
}
ALL = CONSTRUCTION | OPTIONS | TENSORS | LOGPROBS


@pytest.mark.parametrize(("refused", "kind", "words"), ALL.values(), ids=ALL.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        refused()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


@pytest.mark.parametrize("token", [-1, V, 10_000])
@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
def test_tokens_outside_the_common_vocabulary_are_refused_on_the_cpu(token, hard_weight, backend, device):
    """The vocabulary is the smaller one; the same token in a masked row is not read."""
    if device.type != "cpu":
        pytest.skip("a check on a GPU would stall the stream: such a token has log-probability -inf there")
    tokens, teacher = torch.tensor([0, 1, token, 2]), topd.Head(f32(V + 3, H))
    with pytest.raises(ValueError, match=rf"tokens must lie in \[0, {V}\).*got {token}.*mask"):
        call(tokens=tokens, teacher=teacher, hard_weight=hard_weight, backend=backend)
    mask = torch.tensor([True, True, False, True])
    value = call(tokens=tokens, teacher=teacher, hard_weight=hard_weight, backend=backend, mask=mask)
    assert value.isfinite().all()


@pytest.mark.parametrize("token", [-100, -1, V, 10_000])
def test_ids_outside_the_vocabulary_are_refused_on_the_cpu(token, backend, device):
    """The same id in a masked row is not read."""
    if device.type != "cpu":
        pytest.skip("a check on a GPU would stall the stream: such an id has log-probability -inf there")
    ids = f32(N, M).long()
    ids[2, 1] = token
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, {V}\).*head\.weight.*got {token}.*mask"):
        chosen(ids=ids, backend=backend)
    mask = torch.tensor([True, True, False, True])
    assert chosen(ids=ids, backend=backend, mask=mask).isfinite().all()


@pytest.mark.parametrize("name", ["reference", "eager", "cpp", "triton"])
def test_backends_says_what_is_here_and_one_asked_for_by_name_never_falls_back(name):
    found = topd.backends()
    assert list(found) == ["reference", "eager", "cpp", "triton"]
    assert found[name].detail
    if found[name] and name != "triton":
        assert call(backend=name).shape == (N,)
    elif not found[name]:
        for ask in (call, chosen):
            with pytest.raises(ValueError, match=f'(?s)"{name}".*not available') as caught:
                ask(backend=name)
            assert found[name].detail in str(caught.value)


def test_dataclasses_are_frozen():
    for value, field in (
        (head(), "scale"),
        (low_rank(), "scaling"),
        (topd.JSD(), "beta"),
        (topd.ForwardKL(), "entry_clip"),
    ):
        with pytest.raises(AttributeError, match=field):
            setattr(value, field, 0.5)


@pytest.mark.parametrize(
    ("name", "instance"),
    [
        ("forward_kl", topd.ForwardKL()),
        ("reverse_kl", topd.ReverseKL()),
        ("jsd", topd.JSD(0.5)),
        ("skew_kl", topd.SkewKL(0.1)),
        ("skew_reverse_kl", topd.SkewReverseKL(0.1)),
        ("total_variation", topd.TotalVariation()),
    ],
)
def test_names_stand_for_the_defaults(name, instance):
    sides = {"student_hidden": torch.randn(N, H), "student": topd.Head(torch.randn(V, H))}
    assert torch.equal(call(**sides, divergence=name), call(**sides, divergence=instance))
    assert type(instance)() == instance


def test_a_detached_head_shares_storage_and_requires_no_grad():
    adapter = topd.LowRank(grad(2, H), grad(V, 2), 0.5)
    original = topd.Head(grad(V, H), grad(V), scale=2.0, softcap=7.0, adapter=adapter)
    detached = original.detach()
    assert (detached.scale, detached.softcap, detached.adapter.scaling) == (2.0, 7.0, 0.5)
    for was, now in (
        (original.weight, detached.weight),
        (original.bias, detached.bias),
        (adapter.a, detached.adapter.a),
        (adapter.b, detached.adapter.b),
    ):
        assert was.data_ptr() == now.data_ptr()
        assert not now.requires_grad
