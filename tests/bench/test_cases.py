"""The random inputs of the benchmarks."""

import pytest
import torch

from topd_bench.cases import Case, zipf_ids


def test_ids_follow_zipfs_law():
    """P(id < k) = log(k + 1) / log(V + 1): the first id is the one of 5.8 % of the places, half lie below 390."""
    ids = zipf_ids(2000, 151_936, 50, torch.Generator().manual_seed(0))
    assert (ids.shape, ids.dtype) == ((2000, 50), torch.int64)
    for k, share in ((1, 0.0581), (389, 0.5), (151_936, 1.0)):
        assert (ids < k).double().mean().item() == pytest.approx(share, abs=0.01)
    assert ids.min() == 0


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_a_small_vocabulary(vocab):
    ids = zipf_ids(100, vocab, 3, torch.Generator().manual_seed(0))
    assert set(ids.unique().tolist()) == set(range(vocab))


def test_a_shape_declares_its_flop_and_bytes():
    """N 2, V 10, H 3 and 5. Products: 2 * 2 * 10 * (3 * 3 + 5) flop. Read: 6 + 10 states, 30 + 50 weights; written: 6 + 30."""
    case = Case("by hand", n=2, vocab=10, student_width=3, teacher_width=5)
    assert case.gemm_flop(trainable_head=True) == 560
    assert case.gemm_flop(trainable_head=False, teacher=False) == 2 * 2 * 10 * 2 * 3
    assert case.least_bytes(trainable_head=True) == 4 * (96 + 36)
    assert case.least_bytes(trainable_head=False, teacher=False, itemsize=2) == 2 * (36 + 6)
