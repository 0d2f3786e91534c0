"""Numbers beyond any float or int64, and tensors that are not dense: refused by the name of the argument."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topd

N, H, V = 4, 3, 7
HUGE, LONG = 10**400, 10**5000  # beyond float64's range; beyond the digits that Python prints

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "_mkldnn": lambda x: x.to_mkldnn(),
    "a nested tensor": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
}


def call(**changes: Any) -> Any:
    head, hidden = topd.Head(torch.ones(V, H)), torch.ones(N, H)
    options = {"student_hidden": hidden, "student": head, "teacher_hidden": hidden, "teacher": head} | changes
    return topd.linear_divergence(**options)


NUMBERS: dict[str, tuple[Callable[[int], Any], str]] = {
    "temperature": (lambda n: call(temperature=n), "temperature must be finite"),
    "hard_weight": (lambda n: call(hard_weight=n, tokens=torch.zeros(N).long()), "hard_weight must be finite"),
    "softcap": (lambda n: topd.Head(torch.ones(V, H), softcap=n), "Head.softcap must be finite"),
    "scale": (lambda n: topd.Head(torch.ones(V, H), scale=-n), "Head.scale must be finite"),
    "entry_clip": (lambda n: topd.ForwardKL(n), "entry_clip must be finite"),
    "beta": (lambda n: topd.JSD(n), "beta must be finite"),
    "threshold": (
        lambda n: topd.select_candidates(torch.ones(2, 3), rule="threshold", value=n),
        "value must be finite",
    ),
    "workspace_bytes": (lambda n: call(workspace_bytes=n), "workspace_bytes must be at most"),
    "k": (lambda n: topd.topk_logprobs(torch.ones(N, H), topd.Head(torch.ones(V, H)), n), "k must be at most"),
}


@pytest.mark.parametrize("number", [HUGE, LONG], ids=["400 digits", "5000 digits"])
@pytest.mark.parametrize(("refused", "words"), NUMBERS.values(), ids=NUMBERS.keys())
def test_a_huge_int_is_refused_by_name(refused, words, number):
    with pytest.raises(ValueError, match=rf"^{re.escape(words)}.*got an int of {number.bit_length()} bits"):
        refused(number)


@pytest.mark.parametrize(("kind", "make"), KINDS.items(), ids=KINDS.keys())
@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:Sparse:UserWarning")
def test_a_tensor_that_is_not_dense_is_refused_by_name(kind, make):
    bad = make(torch.ones(V, H))
    ids, head = torch.zeros(V, 2).long(), topd.Head(torch.ones(V, H))
    refused: dict[str, Callable[[], Any]] = {
        "student_hidden": lambda: call(student_hidden=bad),
        "teacher_hidden": lambda: call(teacher_hidden=bad),
        "Head.weight": lambda: topd.Head(bad),
        "LowRank.a": lambda: topd.LowRank(bad, torch.ones(V, V), 1.0),
        "hidden": lambda: topd.linear_logprobs(bad, head, ids),
        "target_probs": lambda: topd.soft_target_kl(torch.ones(V, H), head, torch.zeros(V, H).long(), bad),
        "score": lambda: topd.select_candidates(bad),
        "embedding": lambda: topd.near_future_divergence(ids, ids, bad),
    }
    for name, run in refused.items():
        with pytest.raises(TypeError, match=rf"^{re.escape(name)} must be a dense tensor, got .*{kind}"):
            run()


def test_a_mask_and_ids_that_are_not_dense_are_refused_by_name():
    with pytest.raises(TypeError, match=r"^mask must be a dense tensor.*to_dense"):
        call(mask=torch.ones(N).bool().to_sparse())
    with pytest.raises(TypeError, match=r"^tokens must be a dense tensor.*to_dense"):
        call(tokens=torch.ones(N).long().to_sparse())
