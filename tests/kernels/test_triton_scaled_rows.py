"""topd::scaled_rows, the Triton kernel and the same in torch, against float64 and numbers by hand."""

import math

import pytest
import torch
from triton_cases import DEVICE, NEEDS_TRITON, rounded

from topd.ops.shared.engines import EAGER, TRITON, Engine
from topd.ops.shared.scaled_rows import scaled_rows

pytestmark = NEEDS_TRITON
EACH_ENGINE = pytest.mark.parametrize("engine", [EAGER, TRITON], ids=lambda engine: engine.name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@EACH_ENGINE
def test_by_hand(engine: Engine):
    """A scale of 0 gives 0 whatever the row holds; one that is not a number makes the row so."""
    x = torch.tensor([[1.0, -2.0, 3.0], [math.inf, math.nan, 1.0], [1.0, 2.0, math.inf], [1.0, 0.0, 5.0]], device=DEVICE)
    result = scaled_rows(engine, x, torch.tensor([0.5, 0.0, -2.0, math.nan], device=DEVICE), torch.float32)
    assert result[:3].tolist() == [[0.5, -1.0, 1.5], [0.0, 0.0, 0.0], [-2.0, -4.0, -math.inf]]
    assert result[3].isnan().all()


@EACH_ENGINE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 1), (5, 33), (3, 1025), (0, 7), (4, 0)])
def test_the_product_is_rounded_once(n, width, given, dtype, engine):
    """The product of two float32, exact in float64, is float32's; that is rounded to the result's dtype."""
    x, scale = torch.randn(n, width, device=DEVICE).to(given), torch.randn(n, device=DEVICE)
    true = x.double() * scale.double().unsqueeze(-1)
    result = scaled_rows(engine, x, scale, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, rounded(true.float(), dtype) if engine is TRITON else true.float().to(dtype))


@EACH_ENGINE
def test_float64_stays_float64(engine: Engine):
    x, scale = torch.randn(4, 9, device=DEVICE).double(), torch.randn(4, device=DEVICE).double()
    assert torch.equal(scaled_rows(engine, x, scale, torch.float64), x * scale.unsqueeze(-1))


@EACH_ENGINE
def test_strides_of_every_operand(engine: Engine):
    """An expanded number, every second scale, rows of a wider tensor, and a tensor that is stored by columns."""
    wide = torch.randn(6, 12, device=DEVICE)
    x, expected = wide[:, 2:9], wide[:, 2:9] * 0.25
    assert torch.equal(scaled_rows(engine, x, torch.full((), 0.25, device=DEVICE).expand(6), torch.float32), expected)
    scale = torch.randn(12, device=DEVICE)[::2]
    for same in (x, x.T.contiguous().T):
        assert torch.equal(scaled_rows(engine, same, scale, torch.float32), x * scale.unsqueeze(-1))
