"""SmolLM2-135M as the demo reads it, once in a process: reading it takes ten seconds."""

import copy
import functools
from typing import Any

import pytest

from topd_demo import smollm2

needs_model = pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing() or "installed")


@functools.cache
def model() -> Any:
    """Return the model that all tests share: none may change it."""
    return smollm2.load_model()


@functools.cache
def _tokenizer() -> Any:
    return smollm2.load_tokenizer()


def tokenizer() -> Any:
    """Return a tokenizer of the caller's own."""
    return copy.deepcopy(_tokenizer())
