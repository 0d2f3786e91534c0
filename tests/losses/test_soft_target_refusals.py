"""What topd.soft_target_kl refuses, by name."""

import math

import compare
import pytest
import torch
from compare import random_model
from refusals import assert_refused
from soft_target_cases import M, V, by_topd, random_targets, truth

import topd


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("token", [-2, -1, V, 10_000])
def test_ids_outside_the_vocabulary_are_refused_where_they_have_probability(token, backend):
    # Not on a GPU, where the check would stall the stream: such a token has probability 0 there.
    model = random_model(2, V, 7)
    ids, probs = torch.tensor([[0, 1], [token, 2]]), f64([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, {V}\).*got {token}"):
        topd.soft_target_kl(model.hidden, model.head(), ids, probs, backend=backend)


def test_rows_that_do_not_sum_to_one_are_refused_or_divided_by_their_sum(backend):
    model = random_model((2, 2), V, 7)
    ids, probs = random_targets(2, 2, M)
    probs[1, 0] *= 0.75
    with pytest.raises(ValueError, match=r"target_probs must sum to 1.*got 0\.75 at index \[1, 0\].*normalize=True.*mask"):
        topd.soft_target_kl(model.hidden, model.head(), ids, probs, backend=backend)
    outcome = by_topd(model, ids, probs, normalize=True, backend=backend)
    compare.assert_outcome(outcome, truth(model, ids, probs / probs.sum(-1, keepdim=True)), 1e-11)


@pytest.mark.parametrize(("off", "taken"), [(9e-4, True), (-9e-4, True), (1.1e-3, False), (-1.1e-3, False)])
def test_sums_are_asked_to_be_one_within_a_thousandth(off, taken):
    model = random_model(1, V, 7)
    ids, probs = random_targets(1, M)
    if taken:
        assert topd.soft_target_kl(model.hidden, model.head(), ids, probs * (1 + off)).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"sum to 1 within 0\.001"):
            topd.soft_target_kl(model.hidden, model.head(), ids, probs * (1 + off))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("bad", "shown"), [(-0.25, "-0.25"), (math.nan, "nan"), (math.inf, "inf")])
def test_negative_and_non_finite_probabilities_are_refused(bad, shown, normalize):
    """-0.25 beside 1.25 sums to 1, and is refused all the same."""
    model = random_model(2, V, 7)
    probs = f64([[0.5, 0.5], [1 - bad, bad]])
    probs[1, 0].nan_to_num_(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=rf"target_probs must be finite and >= 0, got {shown} at index \[1, 1\]"):
        topd.soft_target_kl(model.hidden, model.head(), torch.tensor([[0, 1], [2, 3]]), probs, normalize=normalize)


def test_a_row_without_any_probability_cannot_be_normalised():
    model = random_model(2, V, 7)
    ids, probs = torch.tensor([[0, 1], [2, 3]]), f64([[0.5, 0.5], [0, 0]])
    with pytest.raises(ValueError, match=r"target_probs must have a sum > 0.*got 0 at index \[1\]"):
        topd.soft_target_kl(model.hidden, model.head(), ids, probs, normalize=True)


def call(**changes):
    model = random_model(2, V, 7)
    given = {"target_ids": torch.tensor([[0, 1], [2, 3]]), "target_probs": torch.full((2, 2), 0.5)} | changes
    return topd.soft_target_kl(given.pop("hidden", model.hidden), given.pop("head", model.head()), **given)


REFUSED = {
    "probs grad": ({"target_probs": torch.full((2, 2), 0.5).requires_grad_()}, ValueError, ["target_probs", "detach()"]),
    "probs int": ({"target_probs": torch.ones(2, 2).long()}, TypeError, ["target_probs", "float32", "int64"]),
    "probs list": ({"target_probs": [[0.5, 0.5]] * 2}, TypeError, ["target_probs", "Tensor", "list"]),
    "probs shape": ({"target_probs": torch.ones(2, 1)}, ValueError, ["target_probs", "[2, 2]", "[2, 1]"]),
    "probs device": ({"target_probs": torch.ones(2, 2, device="meta")}, ValueError, ["target_probs", "meta", "cpu", "move"]),
    "ids int32": ({"target_ids": torch.ones(2, 2).int()}, TypeError, ["target_ids", "torch.int64", "torch.int32"]),
    "ids rows": ({"target_ids": torch.ones(3, 2).long()}, ValueError, ["target_ids", "[2, 2]", "[3, 2]", "hidden"]),
    "ids 1-D": ({"target_ids": torch.ones(2).long()}, ValueError, ["target_ids", "[..., M]", "[2]"]),
    "normalize": ({"normalize": 1}, TypeError, ["normalize", "True or False", "1"]),
    "mask": ({"mask": torch.ones(2)}, TypeError, ["mask", "torch.bool", "torch.float32"]),
    "mask shape": ({"mask": torch.ones(2, 1).bool()}, ValueError, ["mask", "[2]", "[2, 1]"]),
    "hint": ({"weights_hint": torch.ones(3)}, ValueError, ["weights_hint", "[2]", "[3]"]),
    "temperature": ({"temperature": 0.0}, ValueError, ["temperature", "> 0"]),
    "head": ({"head": torch.ones(V, 7)}, TypeError, ["head", "topd.Head", "Tensor"]),
    "hidden": ({"hidden": torch.ones(2, 6).double()}, ValueError, ["hidden", "7]", "[2, 6]"]),
    "workspace": ({"workspace_bytes": 0}, ValueError, ["workspace_bytes", "> 0"]),
    "backend": ({"backend": "cuda"}, ValueError, ["backend", "'eager'", "'cuda'"]),
}


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changes, kind, words):
    assert_refused(lambda: call(**changes), kind, words)
