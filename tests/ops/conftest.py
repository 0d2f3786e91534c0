"""What the tests of ops share."""

from collections.abc import Iterator

import pytest
import torch

from topd.ops.shared.engines import Engine, engine_of


@pytest.fixture
def cold_compiler() -> Iterator[None]:
    """Let nothing compiled before, here or in an earlier run, stand in for compiling now; no pool of compilers is started."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        yield
    torch._dynamo.reset()


@pytest.fixture
def engine(chunked: str) -> Engine:
    return engine_of(chunked)
