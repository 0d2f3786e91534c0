"""Ways to compute a divergence in a training step: the same values, also where the vocabularies differ."""

import pytest
import torch

from topd_bench.ways import WAYS, installed, random_inputs, value_and_gradients


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd"])
def test_values_of_all_ways_agree(loss):
    torch.manual_seed(0)
    inputs = random_inputs(40, (300, 310), (32, 48), torch.float32, trained=True)
    values = {way: WAYS[way](inputs, loss)[0].detach() for way in installed()}
    assert {"topd", "eager"} <= set(values)
    for way, value in values.items():
        torch.testing.assert_close(value, values["topd"], atol=1e-5, rtol=1e-4, msg=f"{way}, {loss}")


def test_gradients_stay_off_the_inputs():
    inputs = random_inputs(8, (30, 20), (8, 16), torch.float32, trained=False)
    for way in installed():
        value_and_gradients(way, inputs, "jsd")
    assert inputs.student_hidden.grad is None
