"""What the tests of `python -m topd_bench.gpu` share."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from topd_bench.cases import Case
from topd_kernels import register

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(not register.interpreted(), reason="CPU tensors need TRITON_INTERPRET=1")
CASE = Case("small", n=2, vocab=40, student_width=8, teacher_width=6)
