"""One plan of a call: its time is that of the chunks that are printed."""

import torch

from topd.costs import call as module
from topd.costs.call import LossCall
from topd.costs.devices import DEVICES
from topd.costs.shapes import ModelShape


def test_time_and_chunks_are_of_one_plan(monkeypatch):
    """A vocabulary that is padded to 16 entries in the tiles: both count the padding."""
    sides = ModelShape("student", 4096, 151_937), ModelShape("teacher", 5120, 151_937)
    call = LossCall(*sides, 20_000, torch.bfloat16, "jsd", True, DEVICES[0])
    asked, original = [], module.predicted_time

    def remembered(shape, device, loss, plan, **options):
        asked.append(plan)
        return original(shape, device, loss, plan, **options)

    monkeypatch.setattr(module, "predicted_time", remembered)
    chunks = call.plan()
    assert call.time(chunks)["total_ms"] > 0
    (plan,) = asked
    assert (plan.rows, plan.chunks, plan.pile, plan.workspace_bytes) == (
        chunks.rows,
        chunks.chunks,
        chunks.pile,
        chunks.workspace_bytes,
    )
    bounds = plan.bounds()
    assert max(stop - start for start, stop in bounds) <= chunks.rows
    assert len(bounds) == chunks.chunks
