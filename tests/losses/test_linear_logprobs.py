"""topd.linear_logprobs: values and gradients in every ordinary case."""

import math
from dataclasses import replace
from typing import Any

import compare
import pytest
import torch
import torch.nn.functional as F
from compare import TENSORS, Model, Outcome, random_model
from logprob_cases import OPTIONS, Problem, by_topd, gradients, plain, random_problem, run
from torch import Tensor

import topd

LOG2, LOG5 = math.log(2), math.log(5)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_literal_values_and_gradients(backend, device):
    """p = (1, 2, 5) / 8 in both rows; ids (0, 2), and 1 twice. Upstream (2, -1) sends (2, 0, -1) - p to the logits, (1, 3)
    sends (0, 4, 0) - 4 p; an entropy's upstream of h sends -h p (log p + entropy)."""
    p = f64([1 / 8, 2 / 8, 5 / 8])
    entropy = 1 / 8 * 3 * LOG2 + 1 / 4 * 2 * LOG2 + 5 / 8 * (3 * LOG2 - LOG5)
    problem = Problem(Model(f64([[1], [1]]), f64([[0], [LOG2], [LOG5]])), torch.tensor([[0, 2], [1, 1]]))
    outcome = by_topd(problem.to(device), backend, f64([[2, -1, 10], [1, 3, 0]]).to(device))
    expected = f64([[-3 * LOG2, LOG5 - 3 * LOG2, entropy], [-2 * LOG2, -2 * LOG2, entropy]])
    torch.testing.assert_close(outcome.value.cpu(), expected, rtol=1e-13, atol=1e-13)
    by_entropy = -10 * p * (f64([-3 * LOG2, -2 * LOG2, LOG5 - 3 * LOG2]) + entropy)
    first, second = f64([15 / 8, -1 / 4, -13 / 8]) + by_entropy, f64([-1 / 2, 3, -5 / 2])
    torch.testing.assert_close(outcome.grads["weight"][:, 0].cpu(), first + second, rtol=1e-13, atol=1e-13)
    hidden = [LOG2 * row[1] + LOG5 * row[2] for row in (first, second)]
    torch.testing.assert_close(outcome.grads["hidden"][:, 0].cpu(), torch.stack(hidden), rtol=1e-13, atol=1e-13)


def test_one_id_is_the_cross_entropy(backend, device):
    model, targets = random_model(20, 33, 6).to(device), torch.randint(33, (20,), device=device)
    mine, torchs = model.leaves(("hidden", "weight")), model.leaves(("hidden", "weight"))
    loss = -topd.linear_logprobs(mine.hidden, mine.head(), targets.unsqueeze(-1), backend=backend).mean()
    expected = F.cross_entropy(torchs.hidden @ torchs.weight.T, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for name in ("hidden", "weight"):
        compare.assert_near(getattr(mine, name).grad, getattr(torchs, name).grad, 1e-12, name)


@pytest.mark.parametrize("m", [0, 1, 3, 50])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_float64_value_and_gradients(options, m, backend, device):
    """50 ids of 41 tokens repeat some in every row; no id at all leaves the entropy."""
    problem = random_problem(options, m=m).to(device)
    upstream = problem.upstream()
    compare.assert_outcome(by_topd(problem, backend, upstream), plain(problem, upstream), 1e-11)


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("m", [1, 3, 50])
@pytest.mark.parametrize("options", ["bias", "softcap", "everything"])
def test_no_worse_than_eager_at_the_dtype(options, m, dtype, backend, device):
    """The truth is that of the rounded inputs."""
    problem = random_problem(OPTIONS[options], n=64, m=m, vocab=300).to(device).to(dtype)
    upstream = problem.upstream()
    ours, yardstick, truth = (
        by_topd(problem, backend, upstream),
        plain(problem, upstream, dtype=None),
        plain(problem, upstream),
    )
    for i, what in ((slice(0, m), "log-probabilities"), (slice(m, None), "entropy")):
        values = (outcome.value[:, i] for outcome in (ours, yardstick, truth))
        compare.assert_no_worse(*values, compare.CONSTANT, what)
    for name, true in truth.grads.items():
        compare.assert_no_worse(ours.grads[name], yardstick.grads[name], true, compare.CONSTANT, f"gradient of {name}")


@pytest.mark.parametrize("vocab", [2, 13, 1000, 4099])
def test_odd_vocabularies(vocab, backend, device):
    problem = random_problem({}, n=5, vocab=vocab).to(device)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        problem, upstream = problem.to(dtype), problem.upstream()
        compare.assert_outcome(by_topd(problem, backend, upstream), plain(problem, upstream), tolerance)


SHAPES = {
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "all_but_the_last_column": lambda x: x[:, :-1],
    "every_second_column": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "one_row_expanded": lambda x: x[:, :1].expand(-1, 6, -1),
    "one_token": lambda x: x[0, 0],
}


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_and_strides(view, columns, backend, device):
    """Any leading shape and any strides of hidden states, ids and, stored by columns, of hidden states, weight and adapter."""

    def stored(x: Tensor) -> Tensor:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1) if columns else x

    model = random_model((3, 6), 23, 8, rank=2).map(lambda _, x: stored(x)).to(device)
    ids = view(torch.randint(23, (3, 6, 8), device=device))[..., ::2]
    problem = Problem(replace(model, hidden=view(model.hidden)), ids)
    upstream = problem.upstream()

    def outcome(compute) -> Outcome:
        leaves = model.leaves(TENSORS)
        value = compute(replace(leaves, hidden=view(leaves.hidden)))
        return Outcome(value.detach(), gradients(value, upstream, leaves))

    def truth(seen: Model) -> Tensor:
        logprobs = seen.logits().log_softmax(-1)
        return torch.cat([logprobs.gather(-1, ids), -(logprobs.exp() * logprobs).sum(-1, keepdim=True)], -1)

    ours = outcome(lambda seen: run(problem, seen, backend))
    assert ours.value.shape == (*ids.shape[:-1], 5)
    compare.assert_outcome(ours, outcome(truth), 1e-11)


def test_batch_of_rows_with_mask(backend, device):
    """[B, T] masks and ids index the same rows as [N] ones."""
    flat = random_problem(OPTIONS["everything"], n=12).to(device)
    model = replace(flat.model, hidden=flat.model.hidden.view(3, 4, -1))
    shaped = replace(flat, model=model, ids=flat.ids.view(3, 4, -1), mask=flat.mask.view(3, 4))
    upstream = shaped.upstream()
    compare.assert_outcome(by_topd(shaped, backend, upstream), plain(shaped, upstream), 1e-11)


def test_masked_rows_are_exactly_zero(backend, device):
    problem = random_problem(OPTIONS["mask"]).to(device)
    problem.mask[0] = False
    outcome = by_topd(problem, backend, problem.upstream())
    assert not outcome.value[~problem.mask].any()
    assert not outcome.grads["hidden"][~problem.mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=str)
def test_what_comes_back(dtype, backend, device):
    """One tensor, or a pair with the entropy; float32, or float64 for float64; gradients in their tensors' dtypes."""
    leaves = random_model((2, 3), 9, 4, bias=True, rank=2).to(device).to(dtype).leaves(TENSORS)
    ids = torch.randint(9, (2, 3, 5), device=device)
    alone = topd.linear_logprobs(leaves.hidden, leaves.head(), ids, backend=backend)
    pair = topd.linear_logprobs(leaves.hidden, leaves.head(), ids, return_entropy=True, backend=backend)
    assert isinstance(alone, Tensor)
    assert isinstance(pair, tuple)
    logprobs, entropy = pair
    assert alone.shape == logprobs.shape == (2, 3, 5)
    assert entropy.shape == (2, 3)
    assert alone.dtype == logprobs.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(alone, logprobs)
    (logprobs.sum() + entropy.sum()).backward()
    assert all(getattr(leaves, name).grad.dtype == dtype for name in TENSORS)


def test_constants_need_no_gradient(backend, device):
    problem = random_problem(OPTIONS["everything"]).to(device)
    assert not run(problem, problem.model, backend).requires_grad
    with torch.no_grad():
        assert not run(problem, problem.model.leaves(TENSORS), backend).requires_grad


def test_an_adapter_may_have_another_dtype_than_its_head(backend, device):
    """PEFT keeps adapters in float32 beside a bfloat16 head."""
    problem = random_problem({"rank": 2}, n=16).to(device).to(torch.bfloat16)
    model = replace(problem.model, a=problem.model.a.float(), b=problem.model.b.float())
    problem, upstream = replace(problem, model=model), problem.upstream()
    outcome, truth = by_topd(problem, backend, upstream), plain(problem, upstream)
    assert outcome.grads["a"].dtype == outcome.grads["b"].dtype == torch.float32
    assert outcome.grads["hidden"].dtype == torch.bfloat16
    compare.assert_near(outcome.value, truth.value, 2e-6, "value")
    dlogits = 1e-5 if device.type == "cpu" else torch.finfo(torch.bfloat16).eps / 2  # on a GPU rounded to the head's dtype
    for name in ("a", "b"):
        compare.assert_near(outcome.grads[name], truth.grads[name], dlogits, name)


def test_autocast_casts_as_linear_does(backend, device):
    """Under bfloat16 autocast float32 operands give what their bfloat16 copies give; gradients come back in float32."""
    problem = random_problem({"bias": True, "rank": 2}, n=16).to(device).to(torch.float32)
    upstream = problem.upstream()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outcome = by_topd(problem, backend, upstream)
    explicit = by_topd(problem.to(torch.bfloat16), backend, upstream)
    assert outcome.value.dtype == torch.float32
    assert torch.equal(outcome.value, explicit.value)
    for name, grad in outcome.grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, explicit.grads[name].float()), name


def test_autocast_leaves_float64_alone(backend, device):
    problem = random_problem({}).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outcome = by_topd(problem, backend)
    compare.assert_outcome(outcome, plain(problem), 1e-11)


@pytest.mark.parametrize("m", [1, 8])
def test_chunk_plans_agree_and_each_repeats_itself(m, backend, device):
    """From a row a chunk to all rows in one; for one plan value and gradients are bitwise the same again."""
    problem = random_problem({"bias": True, "rank": 2, "mask": True}, n=37, m=m, vocab=1000).to(device).to(torch.float32)
    upstream = problem.upstream()
    truth = plain(problem, upstream)
    for workspace_bytes in (70_000, 200_000, 1_000_000, None):
        first, again = (by_topd(problem, backend, upstream, workspace_bytes=workspace_bytes) for _ in range(2))
        compare.assert_outcome(first, truth, 2e-5)
        assert torch.equal(first.value, again.value)
        assert all(torch.equal(grad, again.grads[name]) for name, grad in first.grads.items())


def test_many_rows_that_choose_the_same_few_tokens_repeat_themselves(backend, device):
    """The order in which a token's rows are added is fixed, however the work is threaded."""
    problem = random_problem({"bias": True, "rank": 6}, n=700, m=16, vocab=41).to(device).to(torch.float32)
    upstream = problem.upstream()
    first = by_topd(problem, backend, upstream)
    compare.assert_outcome(first, plain(problem, upstream), 2e-5)
    for _ in range(5):
        again = by_topd(problem, backend, upstream)
        assert all(torch.equal(grad, again.grads[name]) for name, grad in first.grads.items())
