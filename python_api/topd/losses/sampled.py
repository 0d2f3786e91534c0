"""Estimates of the reverse KL from sampled tokens."""

from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_constant, check_tensor, choice, real
from topd.ops.shared.row_math import phi
from topd.options import Estimator

ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def sampled_kl(
    student_logprob: Tensor, teacher_logprob: Tensor, *, estimator: Estimator = "k1", clamp: float | None = None
) -> Tensor:
    """Return estimates of the reverse KL from the log-probabilities of sampled tokens, r = log p_S - log p_T.

    Args:
        student_logprob: [...] floating, nats, of tokens sampled from the student; differentiated.
        teacher_logprob: [...] floating, the same tokens under the teacher; constant.
        estimator: "k1", r: unbiased, of either sign; "k2", r² / 2: its gradient is that of the reverse KL; "k3", exp(-r) - 1 +
            r: unbiased, never negative.
        clamp: None, or c > 0: r is held in [-c, c]; a token beyond has no gradient.

    Returns:
        [...] nats per token, in the wider dtype of the two, at least float32.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or option, or a teacher_logprob that requires grad.
    """
    choice("estimator", estimator, ESTIMATORS)
    student = check_tensor("student_logprob", student_logprob, dtype=FLOATING)
    shape, device = (student.shape, "the shape of student_logprob"), (student.device, "student_logprob")
    teacher = check_tensor("teacher_logprob", teacher_logprob, dtype=FLOATING, shape=shape, device=device)
    check_constant("teacher_logprob", teacher)
    if clamp is not None:
        real("clamp", clamp, low=0.0, open_low=True, hint="None means no clamp")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    r = student.to(dtype) - teacher.to(dtype)
    if clamp is not None:
        r = r.clamp(-clamp, clamp)
    return {"k1": lambda: r, "k2": lambda: r * r / 2, "k3": lambda: phi(r)}[estimator]()
