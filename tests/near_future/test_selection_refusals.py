"""What select_candidates, divergent and false_alarm_weights refuse, by name."""

import math

import pytest
import torch
from refusals import assert_refused
from selection_cases import DIVERGENT, MASK, POSITIONS, SCORE, offsets

from topd import divergent, false_alarm_weights, select_candidates

INF, NAN = math.inf, math.nan


def select(**changes):
    """A good call with some arguments exchanged."""
    return select_candidates(**({"score": torch.tensor(SCORE)} | changes))


def packed(**changes):
    return select_candidates(**({"score": torch.ones(6), "cu_seqlens": offsets(4, 2)} | changes))


def gate(**changes):
    return divergent(**({"distance": torch.ones(4)} | changes))


def weigh(**changes):
    good = {"score": torch.tensor(SCORE), "positions": torch.tensor(POSITIONS), "divergent": torch.tensor(DIVERGENT)}
    return false_alarm_weights(**(good | changes))


def candidates_at(*positions) -> dict[str, torch.Tensor]:
    return {"positions": torch.tensor(positions), "divergent": torch.zeros(len(positions), dtype=torch.bool)}


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BOOLS = torch.tensor(MASK)

REFUSALS = {
    "score list": (lambda: select(score=SCORE), TypeError, ["score", "Tensor", "list"]),
    "score int": (lambda: select(score=torch.ones(2, 5).int()), TypeError, ["score", "float32", "int32", "cast"]),
    "score 1-D": (lambda: select(score=torch.ones(5)), ValueError, ["score", "[B, T]", "[5]", "cu_seqlens"]),
    "score 3-D": (lambda: select(score=torch.ones(2, 5, 1)), ValueError, ["score", "[B, T]", "[2, 5, 1]"]),
    "score packed 2-D": (lambda: packed(score=torch.ones(2, 3)), ValueError, ["score", "[N] with cu_seqlens", "[2, 3]"]),
    "score nan": (
        lambda: select(score=torch.tensor([[0.0, 1.0], [NAN, 0.0]])),
        ValueError,
        ["score", "NaN", "[1, 0]", "mask it out"],
    ),
    "score nan unmasked": (
        lambda: select(score=torch.full((2, 5), NAN), mask=BOOLS),
        ValueError,
        ["score", "NaN", "[0, 1]", "mask it out"],
    ),
    "mask list": (lambda: select(mask=MASK), TypeError, ["mask", "Tensor", "list"]),
    "mask int": (lambda: select(mask=BOOLS.int()), TypeError, ["mask", "torch.bool", "torch.int32", "cast"]),
    "mask shape": (lambda: select(mask=BOOLS[:1]), ValueError, ["mask", "[2, 5]", "[1, 5]", "score"]),
    "mask device": (lambda: select(mask=BOOLS.to("meta")), ValueError, ["mask", "meta", "cpu", "move"]),
    "offsets list": (lambda: packed(cu_seqlens=[0, 6]), TypeError, ["cu_seqlens", "Tensor", "list"]),
    "offsets int64": (
        lambda: packed(cu_seqlens=torch.tensor([0, 6])),
        TypeError,
        ["cu_seqlens", "torch.int32", "torch.int64", "cast"],
    ),
    "offsets 2-D": (lambda: packed(cu_seqlens=i32(0, 6)[None]), ValueError, ["cu_seqlens", "[B + 1]", "[[0, 6]]"]),
    "offsets none": (lambda: packed(cu_seqlens=i32()), ValueError, ["cu_seqlens", "[B + 1]", "[]"]),
    "offsets one": (lambda: packed(cu_seqlens=i32(0)), ValueError, ["cu_seqlens", "[B + 1]", "N = 6", "[0]"]),
    "offsets start": (lambda: packed(cu_seqlens=i32(1, 6)), ValueError, ["cu_seqlens", "start at 0", "[1, 6]", "cumsum"]),
    "offsets fall": (
        lambda: packed(cu_seqlens=i32(0, 4, 3, 6)),
        ValueError,
        ["cu_seqlens", "never decrease", "[0, 4, 3, 6]"],
    ),
    "offsets end": (lambda: packed(cu_seqlens=i32(0, 4)), ValueError, ["cu_seqlens", "end at N = 6", "[0, 4]"]),
    "offsets device": (
        lambda: packed(cu_seqlens=i32(0, 6).to("meta")),
        ValueError,
        ["cu_seqlens", "meta", "score", "cpu", "move"],
    ),
    "rule": (lambda: select(rule="top"), ValueError, ["rule", "'top_fraction'", "'threshold'", "'top'"]),
    "rule type": (lambda: select(rule=None), ValueError, ["rule", "'top_k'", "None"]),
    "fraction 0": (lambda: select(value=0.0), ValueError, ["value", "> 0", "0.0", "'top_fraction'", "fraction"]),
    "fraction above 1": (lambda: select(value=3), ValueError, ["value", "<= 1", "3", "fraction"]),
    "fraction nan": (lambda: select(value=NAN), ValueError, ["value", "finite", "nan"]),
    "fraction type": (lambda: select(value=None), TypeError, ["value", "number", "NoneType"]),
    "k without a value": (lambda: select(rule="top_k"), TypeError, ["value", "int", "float", "'top_k'", "of its own"]),
    "k float": (lambda: select(rule="top_k", value=3.0), TypeError, ["value", "int", "float", "count"]),
    "k bool": (lambda: select(rule="top_k", value=True), TypeError, ["value", "int", "bool"]),
    "k 0": (lambda: select(rule="top_k", value=0), ValueError, ["value", "> 0", "got 0", "count"]),
    "quantile low": (lambda: select(rule="quantile", value=-0.1), ValueError, ["value", ">= 0", "-0.1", "'quantile'"]),
    "quantile high": (lambda: select(rule="quantile", value=1.1), ValueError, ["value", "<= 1", "1.1"]),
    "threshold inf": (lambda: select(rule="threshold", value=INF), ValueError, ["value", "finite", "inf", "'threshold'"]),
    "threshold type": (lambda: select(rule="threshold", value="1"), TypeError, ["value", "number", "str"]),
    "separation negative": (lambda: select(min_separation=-1), ValueError, ["min_separation", "> 0", "-1", "0, for none"]),
    "separation float": (lambda: select(min_separation=0.0), TypeError, ["min_separation", "int", "float"]),
    "separation bool": (lambda: select(min_separation=False), TypeError, ["min_separation", "int", "bool"]),
    "distance list": (lambda: gate(distance=[1.0]), TypeError, ["distance", "Tensor", "list"]),
    "distance int": (lambda: gate(distance=torch.ones(4).int()), TypeError, ["distance", "float32", "int32"]),
    "distance 2-D": (lambda: gate(distance=torch.ones(4, 1)), ValueError, ["distance", "[m]", "[4, 1]", "flatten"]),
    "distance nan": (lambda: gate(distance=torch.tensor([0.0, NAN])), ValueError, ["distance", "NaN", "[1]"]),
    "gate rule": (lambda: gate(rule="quantile"), ValueError, ["rule", "'lowest_fraction_out'", "'quantile'"]),
    "gate fraction": (lambda: gate(value=1.2), ValueError, ["value", "<= 1", "1.2", "'lowest_fraction_out'"]),
    "gate bool": (lambda: gate(value=True), TypeError, ["value", "number", "bool"]),
    "gate no threshold": (lambda: gate(rule="threshold"), TypeError, ["value", "number", "NoneType", "of its own"]),
    "gate threshold": (lambda: gate(rule="threshold", value=-INF), ValueError, ["value", "finite", "-inf"]),
    "gate std": (lambda: gate(rule="mean_plus_std", value=NAN), ValueError, ["value", "finite", "nan", "'mean_plus_std'"]),
    "mode": (lambda: weigh(mode="drop"), ValueError, ["mode", "'keep'", "'cap'", "'mask'", "'drop'"]),
    "weights score nan": (lambda: weigh(score=torch.full((2, 5), NAN)), ValueError, ["score", "NaN"]),
    "weights score 1-D": (lambda: weigh(score=torch.ones(5)), ValueError, ["score", "[B, T]", "[5]"]),
    "weights mask": (lambda: weigh(mask=BOOLS.T), ValueError, ["mask", "[2, 5]", "[5, 2]"]),
    "positions list": (lambda: weigh(positions=POSITIONS), TypeError, ["positions", "Tensor", "list"]),
    "positions int32": (lambda: weigh(positions=i32(0, 1)[None]), TypeError, ["positions", "torch.int64", "torch.int32"]),
    "positions flat": (lambda: weigh(**candidates_at(0, 1)), ValueError, ["positions", "[m, 2]", "row, column", "[2]"]),
    "positions triples": (lambda: weigh(**candidates_at([0, 1, 2])), ValueError, ["positions", "[m, 2]", "[1, 3]"]),
    "positions device": (
        lambda: weigh(positions=torch.tensor(POSITIONS, device="meta")),
        ValueError,
        ["positions", "meta", "move"],
    ),
    "positions packed": (
        lambda: weigh(score=torch.ones(6), cu_seqlens=offsets(4, 2), **candidates_at([0, 1])),
        ValueError,
        ["positions", "[m] with cu_seqlens", "[1, 2]"],
    ),
    "position row": (
        lambda: weigh(**candidates_at([0, 1], [2, 0])),
        ValueError,
        ["positions", "lie in", "[2, 5]", "[2, 0]", "index 1"],
    ),
    "position column": (lambda: weigh(**candidates_at([0, 5])), ValueError, ["positions", "lie in", "[0, 5]"]),
    "position negative": (lambda: weigh(**candidates_at([1, -1])), ValueError, ["positions", "lie in", "[1, -1]"]),
    "position entry": (
        lambda: weigh(score=torch.ones(6), cu_seqlens=offsets(4, 2), **candidates_at(2, 6)),
        ValueError,
        ["positions", "lie in", "[6]", "got 6", "index 1"],
    ),
    "position masked": (
        lambda: weigh(mask=BOOLS, **candidates_at([0, 1], [0, 0])),
        ValueError,
        ["positions", "mask is True", "[0, 0]", "index 1", "select_candidates"],
    ),
    "position twice": (
        lambda: weigh(**candidates_at([0, 1], [1, 1], [0, 1])),
        ValueError,
        ["positions", "distinct", "[0, 1]", "index 2"],
    ),
    "divergent int": (lambda: weigh(divergent=torch.ones(5).int()), TypeError, ["divergent", "torch.bool", "int32"]),
    "divergent shape": (lambda: weigh(divergent=BOOLS[0, :4]), ValueError, ["divergent", "[5]", "[4]", "positions"]),
    "divergent device": (lambda: weigh(divergent=BOOLS[0].to("meta")), ValueError, ["divergent", "meta", "move"]),
}


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)
