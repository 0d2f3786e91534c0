"""What the tests of the near future share."""

import pytest
import torch
from near_future_cases import random_case

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")
SHAPES = {"equal": (7, 7, False), "unequal": (5, 8, False), "ragged": (9, 6, True)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    rows, columns, ragged = request.param
    return random_case(rows, columns, ragged=ragged)
