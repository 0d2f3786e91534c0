"""topd.next_token_mask: from the tokens that count to the states that predict them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import topd

IDS = torch.tensor([[11, 12, 13, 14, 15]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 0]])
EXPECTED = torch.tensor([[False, True, True, False, False]])


def test_the_docstrings_example() -> None:
    assert torch.equal(topd.next_token_mask(RESPONSE), EXPECTED)
    assert torch.equal(topd.next_token_mask(RESPONSE.bool()), EXPECTED)
    assert torch.equal(topd.next_token_mask(labels=torch.tensor([[-100, -100, 13, 14, -100]])), EXPECTED)
    assert IDS.roll(-1, 1).tolist() == [[12, 13, 14, 15, 11]]
    assert IDS.roll(-1, 1)[EXPECTED].tolist() == IDS[RESPONSE.bool()].tolist() == [13, 14]
    words = (topd.next_token_mask.__doc__ or "").split()
    for shown in (IDS, RESPONSE, EXPECTED, IDS.roll(-1, 1)):
        assert "".join(str(shown.tolist()).split()) in "".join(words)


def test_zeros_and_ones_may_be_labels_where_they_are_called_so() -> None:
    labels = torch.tensor([[0, 1, 1, 0], [-100, 0, -100, 1]])
    assert topd.next_token_mask(labels=labels).tolist() == [[True, True, True, False], [True, False, True, False]]
    assert topd.next_token_mask(labels[:1]).tolist() == [[True, True, False, False]]
    own = topd.next_token_mask(labels=labels, ignore_index=0)
    assert own.tolist() == [[True, True, False, False], [False, True, True, False]]


def test_a_row_that_counts_to_its_end_and_rows_without_a_token() -> None:
    assert topd.next_token_mask(torch.ones(1, 3, dtype=torch.bool)).tolist() == [[True, True, False]]
    assert topd.next_token_mask(torch.ones(2, 1, dtype=torch.bool)).tolist() == [[False], [False]]
    assert topd.next_token_mask(torch.ones(2, 0, dtype=torch.bool)).shape == (2, 0)
    assert topd.next_token_mask(torch.ones(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_it_pairs_states_and_tokens_as_slices_do() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 6, 4), topd.Head(torch.randn(9, 4))
    ids, response = torch.randint(9, (2, 6)), torch.rand(2, 6) > 0.4
    whole = topd.linear_logprobs(hidden, head, ids.roll(-1, 1).unsqueeze(-1), mask=topd.next_token_mask(response))
    cut = topd.linear_logprobs(hidden[:, :-1], head, ids[:, 1:].unsqueeze(-1), mask=response[:, 1:])
    torch.testing.assert_close(whole[:, :-1], cut)
    assert (whole[:, -1] == 0).all()


def test_it_is_a_copy_and_compiles() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    topd.next_token_mask(mask).zero_()
    assert mask.all()
    compiled = torch.compile(topd.next_token_mask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(RESPONSE), EXPECTED)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either response_mask or labels, got neither"),
        ({"response_mask": RESPONSE, "labels": IDS}, "give either response_mask or labels, got both"),
        ({"response_mask": IDS}, "response_mask must hold 0 and 1 alone, got 11; give labels as labels="),
        ({"response_mask": torch.tensor([[-100, 1]])}, "response_mask must hold 0 and 1 alone, got -100; give labels as"),
        ({"response_mask": RESPONSE.float()}, "response_mask must be bool or integers 0 and 1, got torch.float32; compare"),
        ({"response_mask": [[True]]}, "response_mask must be a torch.Tensor, got list"),
        ({"response_mask": RESPONSE[0]}, r"response_mask must be \[B, T\], a row for each sequence, got \[5\]; unsqueeze"),
        ({"labels": IDS[0]}, r"labels must be \[B, T\]"),
        ({"labels": RESPONSE.bool()}, "labels must be torch.int64, got torch.bool"),
        ({"labels": IDS, "ignore_index": 0.5}, "ignore_index must be an int, got float"),
    ],
)
def test_what_is_neither_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        topd.next_token_mask(**given)


@pytest.mark.gpu
def test_on_a_gpu_ones_alone_count() -> None:
    """Labels passed by mistake select no prompt there, where the numbers are not checked."""
    labels: Tensor = torch.tensor([[-100, -100, 13, 14, -100]], device="cuda")
    assert not topd.next_token_mask(labels).any()
