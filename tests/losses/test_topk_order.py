"""topd.topk_logprobs returns (logprobs, ids), and code that was written for the other order fails with a word about it."""

import pytest
import torch

import topd

CHANGED = r"topd\.topk_logprobs returns \(logprobs, ids\), as torch\.topk does, no longer \(ids, logprobs\)"


def test_the_order_and_the_names_are_those_of_torch_topk():
    """Logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8."""
    hidden, head = torch.ones(1, 1), topd.Head(torch.tensor([[1.0], [2.0], [5.0]]).log())
    result = topd.topk_logprobs(hidden, head, 2)
    logprobs, ids = result
    assert result.logprobs is logprobs
    assert result.ids is ids
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(logprobs, torch.tensor([[5 / 8, 2 / 8]]).log())


def test_the_old_order_is_refused_with_a_word_about_it():
    hidden, head = torch.randn(3, 4), topd.Head(torch.randn(9, 4))
    ids, logprobs = topd.topk_logprobs(hidden, head, 2)  # as it was
    with pytest.raises(TypeError, match=f"teacher_ids must be torch.int64, got torch.float32; .* {CHANGED}"):
        topd.topk_divergence(hidden, head, ids, logprobs)
    with pytest.raises(TypeError, match=f"target_ids must be torch.int64, got torch.float32; .* {CHANGED}"):
        topd.soft_target_kl(hidden, head, ids, logprobs.exp(), normalize=True)
    with pytest.raises(TypeError, match=f"^ids must be torch.int64, got torch.float32; .* {CHANGED}"):
        topd.linear_logprobs(hidden, head, ids)
    with pytest.raises(
        TypeError, match=f"teacher_logprobs must be float32, float64, bfloat16 or float16, got torch.int64; {CHANGED}"
    ):
        topd.topk_divergence(hidden, head, ids.long(), logprobs)
