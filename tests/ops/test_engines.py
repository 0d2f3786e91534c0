"""Tiles of the engines: how far apart their rows stand."""

import pytest
import torch

from topd.ops.shared import loop
from topd.ops.shared.engines import CPP, EAGER, TRITON, Engine
from topd.ops.shared.plan import plan_chunks
from topd.ops.shared.tiles import Side


@pytest.mark.parametrize(("vocab", "width"), [(1, 16), (16, 16), (17, 32), (50_257, 50_272), (151_936, 151_936)])
def test_rows_of_a_gpus_tiles_begin_on_16_entries(vocab, width):
    tile = TRITON.tile(3, vocab, torch.empty(0), torch.float32)
    assert tile.shape == (3, vocab)
    assert tile.stride() == (width, 1)
    assert TRITON.row_width(vocab) == width


@pytest.mark.parametrize("engine", [EAGER, CPP], ids=lambda engine: engine.name)
def test_rows_on_a_cpu_stand_one_after_the_other(engine: Engine):
    assert engine.row_width(37) == 37
    assert EAGER.tile(3, 37, torch.empty(0), torch.float64).stride() == (37, 1)


@pytest.mark.parametrize("engine", [EAGER, TRITON], ids=lambda engine: engine.name)
def test_rows_of_16_bit_gradients_begin_on_16_entries(engine: Engine):
    side = Side(torch.randn(5, 8), torch.randn(37, 8), None, None, None, 1.0).widened(37, torch.float32, engine)
    plan = plan_chunks(5, 37, workspace_bytes=1 << 20)
    chunks = list(loop.TileLoop(engine, plan, (side,), None, torch.float32, grad_dtype=torch.bfloat16))
    assert chunks[0].grad_tile.shape == (5, 37)
    assert chunks[0].grad_tile.stride() == (48, 1)
