"""topd.topk_logprobs: the k largest log-probabilities of each row and their ids."""

from dataclasses import replace

import compare
import pytest
import torch
from compare import TENSORS, Model, random_model
from logprob_cases import OPTIONS, Problem, plain, random_problem

import topd

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_topk_is_that_of_the_log_softmax(options, device):
    problem = random_problem(options).to(device)
    problem = replace(problem, ids=torch.arange(41, device=device).expand(11, 41), entropy=False)
    expected, expected_ids = plain(problem).value.topk(5, dim=-1)
    kept = torch.ones(11, dtype=torch.bool, device=device) if problem.mask is None else problem.mask
    for workspace_bytes in (None, 41 * 8 * 3 * 2):  # the second holds two rows
        settings = {"temperature": problem.temperature, "mask": problem.mask, "workspace_bytes": workspace_bytes}
        logprobs, ids = topd.topk_logprobs(problem.model.hidden, problem.model.head(), 5, **settings)
        torch.testing.assert_close(logprobs[kept], expected[kept], rtol=1e-11, atol=1e-11)
        assert torch.equal(ids[kept], expected_ids[kept])
        assert not ids[~kept].any()
        assert logprobs[~kept].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_topk_is_no_worse_than_eager_log_softmax(size, dtype, device):
    """Logits that are exact in any dtype, up to 1e4: what is left is the log-softmax's own error."""
    logits = size * torch.eye(6, 40)[:, :6].repeat(1, 7).to(dtype)
    logits[3:] = size + torch.arange(42) % 5 / 4
    model = Model(torch.eye(6), logits.T.contiguous().float()).to(device).to(dtype)
    logprobs, ids = topd.topk_logprobs(model.hidden, model.head(), 4)
    truth, yardstick = (plain(Problem(model, ids, entropy=False), dtype=dtype).value for dtype in (torch.float64, None))
    for ours, eager, true in zip(logprobs, yardstick, truth, strict=True):
        compare.assert_no_worse(ours, eager, true, 1e-7, "log-probabilities")


def test_topk_of_a_batch_and_of_the_whole_vocabulary(device):
    """Shapes, dtypes and order; k = V gives all the probability; nothing requires grad."""
    model = random_model((2, 3), 9, 4).to(device).to(torch.bfloat16).leaves(TENSORS)
    logprobs, ids = topd.topk_logprobs(model.hidden, model.head(), 9)
    assert ids.shape == logprobs.shape == (2, 3, 9)
    assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids.sort(-1).values, torch.arange(9, device=device).expand(2, 3, 9))
    assert (logprobs.diff(dim=-1) <= 0).all()
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(2, 3, device=device))


def test_topk_of_one_token_and_of_none(device):
    model = random_model(4, 9, 4).to(device)
    logprobs, ids = topd.topk_logprobs(model.hidden[0], model.head(), 1)
    assert ids.tolist() == [model.logits()[0].argmax().item()]
    assert logprobs.shape == (1,)
    for hidden, mask in ((model.hidden[:0], None), (model.hidden, torch.zeros(4, dtype=torch.bool, device=device))):
        logprobs, ids = topd.topk_logprobs(hidden, model.head(), 3, mask=mask)
        assert ids.shape == logprobs.shape == (len(hidden), 3)
        assert not ids.any()
        assert logprobs.isneginf().all()


def test_topk_under_autocast_is_that_of_the_cast_operands(device):
    model = random_model(6, 30, 4, bias=True, rank=2).to(device).to(torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logprobs, ids = topd.topk_logprobs(model.hidden, model.head(), 3)
    cast = model.to(torch.bfloat16)
    expected, expected_ids = topd.topk_logprobs(cast.hidden, cast.head(), 3)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(logprobs, expected)
