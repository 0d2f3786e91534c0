"""A contender whose result is wrong is not timed, and the formulas it is held to are the textbook's."""

import math

import pytest
import torch

from topd_bench.agreement import (
    DisagreementError,
    Errors,
    few_weight_gradients,
    is_wrong,
    measure_errors,
    refuse_wrong,
    truth_of,
)
from topd_bench.cases import Case, make_inputs
from topd_bench.losses import LOSSES, Gradients, Workload
from topd_bench.peers import differentiable

CASE = Case("small", n=3, vocab=40, student_width=8, teacher_width=6)
SMALL = Errors(1e-5, 1e-5, 1e-5)


def workload_of(loss: str, *, trainable: bool = True, dtype: torch.dtype = torch.float32) -> Workload:
    return Workload.of(make_inputs(CASE, trainable_head=trainable).to(dtype), loss)


def results_of(workload: Workload) -> dict[str, Gradients]:
    """Return those of topd and of eager code; the import of a library takes seconds."""
    contenders = differentiable(workload, "eager")
    return {name: contenders[name]() for name in ("ours", "eager")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_contenders_agree_with_float64(loss, dtype):
    workload = workload_of(loss, dtype=dtype)
    errors = measure_errors(workload, results_of(workload))
    refuse_wrong(errors, dtype)
    assert (errors["eager"].weight is None) == (dtype == torch.float32)  # its own yardstick
    assert errors["ours"].value < 1e-5


@pytest.mark.parametrize("part", ["value", "hidden", "weight"])
@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_is_refused(part, wrong):
    workload = workload_of("jsd")
    results = results_of(workload)
    results["ours"] = results["ours"]._replace(**{part: getattr(results["ours"], part) * wrong})
    with pytest.raises(DisagreementError, match="ours is off"):
        refuse_wrong(measure_errors(workload, results), torch.float32)


def test_in_16_bits_topd_alone_is_held_to_a_limit():
    refuse_wrong({"eager": Errors(1.0, 1.0, 1.0), "ours": SMALL}, torch.bfloat16)
    with pytest.raises(DisagreementError):
        refuse_wrong({"eager": Errors(1.0, 1.0, 1.0)}, torch.float32)


def test_what_was_not_judged_is_not_wrong():
    assert not is_wrong(Errors(None), SMALL)
    assert not is_wrong(Errors(1.0), Errors(None))
    assert is_wrong(Errors(None, math.nan), SMALL)
    assert is_wrong(Errors(0.0, 0.0, 1e-5), SMALL)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_rows_of_d_weight_are_those_of_eager_code(loss):
    workload = workload_of(loss)
    entries, gradients = few_weight_gradients(workload)
    expected = differentiable(workload, "eager")["eager"]().weight[entries]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    assert entries[[0, -1]].tolist() == [0, CASE.vocab - 1]


def test_the_value_of_a_mean_is_not_judged():
    workload = workload_of("reverse_kl")
    result = differentiable(workload, "eager")["ours"]()
    errors = truth_of(workload).errors(result._replace(value=result.value.mean()))
    assert errors.value is None
    assert errors.hidden < 1e-5
    assert errors.weight is None
