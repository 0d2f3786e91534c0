"""Which backends are here, and that one asked for by name is the one that runs."""

import pytest
from refused_calls import N, call, chosen

import topd


@pytest.mark.parametrize("name", ["reference", "eager", "cpp", "triton"])
def test_backends_says_what_is_here_and_one_asked_for_by_name_never_falls_back(name):
    backends = topd.backends()
    assert list(backends) == ["reference", "eager", "cpp", "triton"]
    assert backends[name].detail
    if backends[name] and name != "triton":
        assert call(backend=name).shape == (N,)
    elif not backends[name]:
        for ask in (call, chosen):
            with pytest.raises(ValueError, match=f'(?s)"{name}".*not available') as caught:
                ask(backend=name)
            assert backends[name].detail in str(caught.value)
