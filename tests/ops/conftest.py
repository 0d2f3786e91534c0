"""What the tests of ops share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def cold_compiler() -> Iterator[None]:
    """Let nothing compiled before, here or in an earlier run, stand in for compiling now; no pool of compilers is started."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        yield
    torch._dynamo.reset()
