"""What linear_logprobs and topk_logprobs refuse, before any work."""

import math

import pytest
import torch
from refusals import Refusal, assert_refused
from refused_calls import H, M, N, V, chosen, f32, top

import topd

NAN = math.nan

REFUSALS: dict[str, Refusal] = {
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


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)


@pytest.mark.parametrize("token", [-100, -1, V, 10_000])
def test_ids_outside_the_vocabulary_are_refused_on_the_cpu(token, backend):
    """The same id in a masked row is not read."""
    # Not on a GPU, where the check would stall the stream: such an id has log-probability -inf there.
    ids = f32(N, M).long()
    ids[2, 1] = token
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, {V}\).*head\.weight.*got {token}.*mask"):
        chosen(ids=ids, backend=backend)
    mask = torch.tensor([True, True, False, True])
    assert chosen(ids=ids, backend=backend, mask=mask).isfinite().all()
