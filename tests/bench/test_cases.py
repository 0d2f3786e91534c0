"""The random inputs of the benchmarks."""

import pytest
import torch

from topd_bench.cases import zipf_ids


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
