"""One check for every tensor argument: what it refuses, in which words, and what it returns."""

import re

import pytest
import torch

from topd.checks.values import FLOATING, check_tensor

DEVICE = (torch.device("cpu"), "hidden")
PAIRS = ((2, 3), "an entry for each id")


@pytest.mark.parametrize("dtype", [None, FLOATING, torch.float32])
def test_a_good_tensor_is_returned_itself(dtype):
    value = torch.zeros(2, 3)
    assert check_tensor("value", value, dtype=dtype, shape=PAIRS, device=DEVICE) is value


@pytest.mark.parametrize(
    ("value", "rule", "error", "message"),
    [
        ([1.0], {}, TypeError, "value must be a torch.Tensor, got list"),
        (torch.zeros(2).to_sparse(), {}, TypeError, "value must be a dense tensor, got the layout torch.sparse_coo; make it"),
        (torch.zeros(2).long(), {"dtype": FLOATING}, TypeError, "float32, float64, bfloat16 or float16, got torch.int64; deq"),
        (torch.zeros(2), {"dtype": torch.int64}, TypeError, "value must be torch.int64, got torch.float32; cast it with .to("),
        (torch.zeros(3, 2), {"shape": PAIRS}, ValueError, "value must have shape [2, 3] (an entry for each id), got [3, 2]"),
        (torch.zeros(2, device="meta"), {"device": DEVICE}, ValueError, "value is on meta, but hidden is on cpu; move them to"),
    ],
)
def test_a_bad_one_is_refused_by_its_rule(value, rule, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_tensor("value", value, **rule)


def test_the_dtype_is_checked_before_shape_and_device():
    rules = {"dtype": FLOATING, "shape": PAIRS, "device": DEVICE}
    with pytest.raises(TypeError, match="float32"):
        check_tensor("value", torch.zeros(5, dtype=torch.int64, device="meta"), **rules)
    with pytest.raises(ValueError, match="shape"):
        check_tensor("value", torch.zeros(5, device="meta"), **rules)


def test_an_inference_tensor_becomes_one_that_autograd_keeps():
    with torch.inference_mode():
        value = torch.ones(2, 3)
    kept = check_tensor("value", value)
    assert not kept.is_inference()
    assert kept.data_ptr() == value.data_ptr()
