"""Students that tensor parallelism splits: their head is read as it is, alone and under FSDP2."""

import pytest
import torch
from compare import assert_near
from two_ranks import start

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCRIPT = "integrations/tensor_parallel_ranks.py"


def assert_as_one_process(gradients, upstream, dtype):
    """The same in float64. In float32 sums over the ranks round otherwise: one process's error and 2e-6."""
    from fsdp2_cases import in_one_process

    truth = in_one_process(upstream=upstream, dtype=torch.float64)
    alone = in_one_process(upstream=upstream, dtype=dtype)
    for name, true in truth.items():
        own = ((alone[name] - true).abs().max() / true.abs().max()).item()
        for gradient in gradients:
            assert_near(gradient[name], true, 1e-12 if dtype == torch.float64 else own + 2e-6, name)


@pytest.mark.parametrize("upstream", ["even", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsdp2_and_tensor_parallelism_give_one_processs_mean(four_ranks, upstream, dtype):
    from fsdp2_cases import PLACES

    assert_as_one_process([rank["places"][place, upstream, dtype] for rank in four_ranks for place in PLACES], upstream, dtype)


@pytest.mark.parametrize("upstream", ["even", "uneven"])
def test_bfloat16_is_as_near_to_the_truth_as_one_process(four_ranks, upstream):
    """The head is split, the layers are whole. Sums over the ranks round otherwise, which in 16 bits is seen everywhere: no
    parameter's gradient is further from float64 than 1.25 times one process's."""
    from fsdp2_cases import in_one_process
    from tensor_parallel_ranks import BF16_PLACES

    truth, alone = in_one_process(upstream=upstream, dtype=torch.float64), in_one_process(True, upstream)
    for rank in four_ranks:
        for place in BF16_PLACES:
            for name, gradient in rank["places"][place, upstream, torch.bfloat16].items():
                error, allowed = ((each.double() - truth[name]).abs().max() for each in (gradient, alone[name]))
                assert error <= 1.25 * allowed + 2e-6 * truth[name].abs().max(), name


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return start(SCRIPT, tmp_path_factory.mktemp("four"), timeout=120, ranks=4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start(SCRIPT, tmp_path_factory.mktemp("two"), timeout=120)


@pytest.mark.parametrize("way", ["torch", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_split_head_is_read_from_the_model(ranks, way, dtype):
    assert_as_one_process([rank["gradients"][way, dtype] for rank in ranks], "uneven", dtype)


def test_the_head_says_which_rows_it_holds(ranks):
    assert [rank["place"] for rank in ranks] == [{"start": 0, "rows": 31, "vocab": 61}, {"start": 31, "rows": 30, "vocab": 61}]
