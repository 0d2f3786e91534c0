"""Tiles of the engines: how far apart their rows stand."""

import pytest
import torch

from topd.ops.linear_logprobs import loop as logprobs_loop
from topd.ops.linear_logprobs.spec import Call, LogprobRows, LogprobSpec, RowsInputs
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


def test_every_tile_of_log_probabilities_begins_its_rows_on_16_entries(monkeypatch):
    """The product's, and the two of 16 bits, of the gradients of the mass outside the ids and of the entropy."""
    side = Side(torch.randn(5, 8).bfloat16(), torch.randn(37, 8).bfloat16(), None, None, None, 1.0)
    ids = torch.zeros(5, 2, dtype=torch.int64)
    call = Call(side, None, ids, LogprobSpec(1.0, None, 1.0), 1 << 20, TRITON, padded=False, dense=True)
    tiles = []

    def rows_of(engine: Engine, inputs: RowsInputs) -> LogprobRows:
        tiles.extend([inputs.product, inputs.grad_tile, inputs.entropy_tile])
        finite = torch.ones(5, dtype=torch.bool)
        return LogprobRows(ids.float(), finite, finite, ids, ids, finite, inputs.grad_tile, inputs.entropy_tile)

    monkeypatch.setattr(logprobs_loop, "run_rows", rows_of)
    list(logprobs_loop.Loop(call, None, grad=True, weight_grad=True, entropy=True))
    assert [(tile.dtype, *tile.shape, *tile.stride()) for tile in tiles] == [
        (dtype, 5, 37, 48, 1) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    ]


@pytest.mark.parametrize("engine", [EAGER, TRITON], ids=lambda engine: engine.name)
def test_rows_of_16_bit_gradients_begin_on_16_entries(engine: Engine):
    side = Side(torch.randn(5, 8), torch.randn(37, 8), None, None, None, 1.0).widened(37, torch.float32, engine)
    plan = plan_chunks(5, 37, workspace_bytes=1 << 20)
    chunks = list(loop.TileLoop(engine, plan, (side,), None, torch.float32, grad_dtype=torch.bfloat16))
    assert chunks[0].grad_tile.shape == (5, 37)
    assert chunks[0].grad_tile.stride() == (48, 1)
