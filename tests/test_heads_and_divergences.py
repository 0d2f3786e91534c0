"""topd.Head, topd.LowRank and the divergences: what they hold, what they stand for and what they refuse."""

import math

import pytest
import torch
from refusals import Refusal, assert_refused
from refused_calls import H, N, V, call, f32, grad, head, low_rank

import topd

NAN = math.nan

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
    "weight empty": (lambda: topd.Head(f32(0, H)), ValueError, ["Head.weight", "[V, H]", f"[0, {H}]", "gather", "inside"]),
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


@pytest.mark.parametrize(("refused", "kind", "words"), CONSTRUCTION.values(), ids=CONSTRUCTION.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)


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
