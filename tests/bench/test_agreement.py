"""A contender whose result is wrong is not timed, and the formulas it is held to are the textbook's."""

import math

import pytest
import torch

from topd_bench.agreement import Errors, few_weight_gradients, is_wrong, limits_of, truth_of, whole_truth
from topd_bench.cases import Case, make_inputs
from topd_bench.losses import LOSSES, Gradients, Workload
from topd_bench.peers import differentiable

CASE = Case("small", n=3, vocab=40, student_width=8, teacher_width=6)
SMALL = Errors(1e-5, 1e-5, 1e-5)


def workload_of(loss: str, *, trainable: bool = True, dtype: torch.dtype = torch.float32) -> Workload:
    return Workload.of(make_inputs(CASE, trainable_head=trainable).to(dtype), loss)


def results_of(workload: Workload) -> dict[str, Gradients]:
    """Return those of topd and of eager code; the import of a library takes seconds."""
    contenders, refusals = differentiable(workload, "eager", ("ours", "eager"))
    assert refusals == {}
    return {name: contender() for name, contender in contenders.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_contenders_agree_with_float64(loss, dtype):
    workload = workload_of(loss, dtype=dtype)
    truth = whole_truth(workload)
    for name, result in results_of(workload).items():
        errors = truth.errors(result)
        assert None not in (errors.value, errors.hidden, errors.weight)
        assert not is_wrong(errors, limits_of(name, dtype))
        assert name != "ours" or errors.value < 1e-5


@pytest.mark.parametrize("part", ["value", "hidden", "weight"])
@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_is_told(part, wrong):
    workload = workload_of("jsd")
    result = results_of(workload)["eager"]
    errors = whole_truth(workload).errors(result._replace(**{part: getattr(result, part) * wrong}))
    assert is_wrong(errors, limits_of("eager", torch.float32))


def test_a_frozen_head_has_no_weight_to_judge():
    workload = workload_of("jsd", trainable=False)
    assert whole_truth(workload).errors(results_of(workload)["ours"]).weight is None


def test_in_16_bits_topd_alone_is_held_to_a_limit():
    far = Errors(1.0, 1.0, 1.0)
    assert not is_wrong(far, limits_of("eager", torch.bfloat16))
    assert is_wrong(far, limits_of("ours", torch.bfloat16))
    assert is_wrong(far, limits_of("eager", torch.float32))


def test_what_was_not_judged_is_not_wrong():
    assert not is_wrong(Errors(None), SMALL)
    assert not is_wrong(Errors(1.0), Errors(None))
    assert is_wrong(Errors(None, math.nan), SMALL)
    assert is_wrong(Errors(0.0, 0.0, 1e-5), SMALL)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_rows_of_d_weight_are_those_of_eager_code(loss):
    workload = workload_of(loss)
    entries, gradients = few_weight_gradients(workload)
    expected = results_of(workload)["eager"].weight[entries]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    assert entries[[0, -1]].tolist() == [0, CASE.vocab - 1]


def test_the_value_of_a_mean_is_not_judged():
    workload = workload_of("reverse_kl")
    result = results_of(workload)["ours"]
    errors = truth_of(workload).errors(result._replace(value=result.value.mean()))
    assert errors.value is None
    assert errors.hidden < 1e-5
    assert errors.weight is None
