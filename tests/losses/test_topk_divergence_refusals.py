"""What topd.topk_divergence refuses, by name."""

import math

import pytest
import torch
from compare import random_model
from refusals import assert_refused
from topk_cases import SUPPORTS, V

import topd


@pytest.mark.parametrize("token", [-2, -1, V, 10_000])
def test_ids_outside_the_vocabulary_are_refused_where_they_have_probability(token, backend):
    # Not on a GPU, where the check would stall the stream: such a token has probability 0 there.
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, {V}\).*got {token}"):
        call(teacher_ids=torch.tensor([[0, 1], [token, 2]]), backend=backend)


def call(**changes):
    model = random_model(2, V, 7)
    given = {"teacher_ids": torch.tensor([[0, 1], [2, 3]]), "teacher_logprobs": torch.full((2, 2), -1.0)} | changes
    return topd.topk_divergence(given.pop("hidden", model.hidden), given.pop("head", model.head()), **given)


LP = torch.full((2, 2), -1.0)

REFUSED = {
    "repeated": ({"teacher_ids": torch.tensor([[0, 1], [5, 5]])}, ValueError, ["teacher_ids", "distinct", "5", "[1, 1]"]),
    "mass": (
        {"teacher_logprobs": torch.tensor([[0.5, 0.25], [0.75, 0.3]]).log()},
        ValueError,
        ["teacher_logprobs", "sum to at most", "1.05", "[1]", "logits"],
    ),
    "logits": ({"teacher_logprobs": torch.tensor([[9.0, 8.0]] * 2)}, ValueError, ["teacher_logprobs", "logits", "[0]"]),
    "k > V": (
        {"teacher_ids": torch.arange(42).expand(2, 42), "teacher_logprobs": torch.full((2, 42), -9.0)},
        ValueError,
        ["teacher_ids", f"{V}", "42"],
    ),
    "NaN": ({"teacher_logprobs": torch.tensor([[-1, -1], [-1, math.nan]])}, ValueError, ["teacher_logprobs", "NaN", "[1, 1]"]),
    "inf": ({"teacher_logprobs": torch.tensor([[-1, math.inf], [-1, -1]])}, ValueError, ["teacher_logprobs", "inf", "[0]"]),
    "logprobs grad": ({"teacher_logprobs": LP.clone().requires_grad_()}, ValueError, ["teacher_logprobs", "detach()"]),
    "logprobs int": ({"teacher_logprobs": LP.long()}, TypeError, ["teacher_logprobs", "float32", "int64"]),
    "logprobs shape": ({"teacher_logprobs": LP[:, :1]}, ValueError, ["teacher_logprobs", "[2, 2]", "[2, 1]"]),
    "logprobs device": ({"teacher_logprobs": LP.to("meta")}, ValueError, ["teacher_logprobs", "meta", "cpu", "move"]),
    "ids int32": ({"teacher_ids": torch.ones(2, 2).int()}, TypeError, ["teacher_ids", "torch.int64", "torch.int32"]),
    "ids rows": ({"teacher_ids": torch.ones(3, 2).long()}, ValueError, ["teacher_ids", "[2, 2]", "[3, 2]"]),
    "direction": ({"direction": "fwd"}, ValueError, ["direction", "'forward'", "'reverse'", "'fwd'"]),
    "support": ({"support": "renormalized"}, ValueError, ["support", "'raw'", "'renormalised'", "'tail'", "'renormalized'"]),
    "support type": ({"support": None}, ValueError, ["support", "None"]),
    "mask": ({"mask": torch.ones(2)}, TypeError, ["mask", "torch.bool", "torch.float32"]),
    "temperature": ({"temperature": -1.0}, ValueError, ["temperature", "> 0"]),
    "head": ({"head": torch.ones(V, 7)}, TypeError, ["head", "topd.Head", "Tensor"]),
    "hidden": ({"hidden": torch.ones(2, 6).double()}, ValueError, ["hidden", "7]", "[2, 6]"]),
    "backend": ({"backend": "cuda"}, ValueError, ["backend", "'eager'", "'cuda'"]),
}


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changes, kind, words):
    assert_refused(lambda: call(**changes), kind, words)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(
    ("hint", "kind"),
    [([1.0, 2.0], TypeError), (torch.ones(2).long(), TypeError), (torch.ones(1), ValueError), (torch.ones(3), ValueError)],
    ids=["list", "int64", "shape 1", "shape 3"],
)
def test_a_wrong_hint_is_refused_also_where_it_is_of_no_use(hint, kind, support):
    with pytest.raises(kind, match="weights_hint"):
        call(weights_hint=hint, support=support)
