"""topd::advise_huge_pages: a fresh buffer of any size and offset can be written to and read afterwards."""

import pytest
import torch

import topd
from topd.ops.shared.advise_huge_pages import LARGE_BYTES, advise_huge_pages

if not topd.backends()["cpp"]:
    pytest.skip("the extension is not here", allow_module_level=True)


@pytest.mark.parametrize("nbytes", [LARGE_BYTES - 1, LARGE_BYTES, (9 << 20) + 5, 64 << 20])
@pytest.mark.parametrize("offset", [0, 1, 4095])
def test_a_fresh_buffer_is_as_good_as_before(nbytes, offset):
    whole = torch.empty(nbytes + offset + 8, dtype=torch.uint8)
    whole[:offset], whole[offset + nbytes :] = 7, 7
    buffer = whole[offset : offset + nbytes]
    assert advise_huge_pages(buffer) is buffer
    buffer.fill_(3)
    assert (buffer == 3).all()
    assert (whole[:offset] == 7).all()
    assert (whole[offset + nbytes :] == 7).all()


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096])
def test_a_buffer_without_a_whole_page_is_left_alone(nbytes):
    buffer = torch.full((nbytes,), 5, dtype=torch.uint8)
    torch.ops.topd.advise_huge_pages(buffer[1:])
    assert (buffer == 5).all()
