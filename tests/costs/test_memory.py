"""Predicted peaks: by hand, and against what fresh processes measure."""

import pytest

from topd.costs import memory
from topd.ops.shared.plan import MIB
from topd_bench.plans import Options
from topd_bench.session import Session

SIZES = memory.Sizes(n=1024, vocab=65_536, width=512, itemsize=4, weight_grad=True)  # a tile is 256 MiB


@pytest.mark.parametrize(("loss", "tiles"), [("reverse_kl", 6), ("forward_kl", 5), ("jsd", 10)])
def test_eager_holds_whole_tiles(loss, tiles):
    parts = memory.eager_memory(SIZES, loss)
    assert memory.total(parts) == tiles * 256 * MIB
    assert parts["log-probabilities"] == 512 * MIB


def test_eager_with_few_rows_and_a_wide_head_peaks_in_the_products():
    """2 MiB of both log-probabilities, 1 of d logits, 1,024 of d weight, a little of d hidden."""
    sizes = memory.Sizes(n=4, vocab=65_536, width=4096, itemsize=4, weight_grad=True)
    assert memory.eager_memory(sizes, "reverse_kl") == {
        "log-probabilities": 2 * MIB,
        "d logits": 1 * MIB,
        "d hidden": 4 * 4096 * 4,
        "d weight": 1024 * MIB,
    }


def test_trl_holds_two_buffers_and_float32_gradients():
    """Buffers of 1,024 x 32,768 float32, 128 MiB; d hidden 2 MiB, d weight 128."""
    wide = {"d hidden in float32": 2 * MIB, "d weight in float32": 128 * MIB}
    assert memory.trl_memory(SIZES, "reverse_kl", kernels=False) == {"logits": 256 * MIB, "temporaries": 9 * 128 * MIB} | wide
    assert memory.trl_memory(SIZES, "jsd", kernels=False) == {"logits": 256 * MIB, "temporaries": 10 * 128 * MIB} | wide
    narrow = memory.trl_memory(SIZES._replace(itemsize=2), "reverse_kl", kernels=True)
    assert narrow == wide | {"logits": 256 * MIB, "d logits": 64 * MIB, "d hidden": MIB, "d weight": 64 * MIB}
    frozen = memory.trl_memory(SIZES._replace(weight_grad=False, n=8192), "reverse_kl", kernels=True)
    assert memory.total(frozen) == 1024 * MIB + 16 * MIB  # buffers hold 4,096 rows at most


@pytest.mark.slow
def test_predicted_peak_is_within_a_tenth_of_the_measured():
    session = Session(Options("profile", shapes=["smollm2"]), None)
    session.run()
    ratios = {row["peer"]: row["measured / predicted"] for row in session.fields}
    measured = {peer: float(ratio) for peer, ratio in ratios.items() if ratio != "-"}
    assert {"topd", "eager"} <= set(measured)  # TRL too, where it is installed
    assert measured == {peer: pytest.approx(1, abs=0.1) for peer in measured}
