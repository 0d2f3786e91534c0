"""What a call that is refused must say."""

from collections.abc import Callable
from typing import Any

import pytest

Refusal = tuple[Callable[[], Any], type[Exception], list[str]]  # the call, its error's type, words of the message


def assert_refused(refused: Callable[[], Any], kind: type[Exception], words: list[str]) -> None:
    """Check the very type of the error, and that it names the argument, the rule or remedy, and what came."""
    with pytest.raises((TypeError, ValueError)) as caught:
        refused()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
