"""What every op of topd is defined with and runs in.

CUDA graphs: the host reads values from the device where there is a mask, where rows deviate from their hint and for float16's
scale; it asks for free memory when it plans; and numbers that torch.compile hands over come on the CPU. A graph would replay
what the call that was captured decided. So each op carries torch's tag for that, by which torch.compile(mode="reduce-overhead")
leaves it out of its graphs, and refuses a stream that is being captured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from topd.products import exact_products


def define(name: str, schema: str) -> None:
    """Define an op, topd::<op>, that no CUDA graph may hold."""
    torch.library.define(name, schema, tags=(torch.Tag.cudagraph_unsafe,))


def refuse_capture(op: str, device: torch.device) -> None:
    """Refuse a call on a stream whose work goes into a CUDA graph.

    Raises:
        RuntimeError: it does.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op} must not be captured into a CUDA graph, got a stream that is being captured: what it runs depends on values "
            "that it reads from the device; call it outside torch.cuda.graph and make_graphed_callables, or use "
            'torch.compile(mode="reduce-overhead"), which captures around it'
        )


@contextmanager
def op_body(op: str, device: torch.device) -> Iterator[None]:
    """Run the body of an op: without autograd and autocast, with exact products, never inside a CUDA graph."""
    refuse_capture(op, device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products(device):
        yield
