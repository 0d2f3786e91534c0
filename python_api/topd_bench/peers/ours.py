"""topd.linear_divergence and topd.linear_logprobs."""

from torch import Tensor

import topd
from topd.divergences import BY_NAME
from topd.options import BackendName
from topd_bench.losses import Workload
from topd_bench.peers.peer import of_loss


def loss(workload: Workload, backend: BackendName | None) -> Tensor:
    """Return nats [N]."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = workload.sides
    student, workspace_bytes = topd.Head(student_weight), workload.inputs.workspace_bytes
    if workload.has_teacher:
        value = topd.linear_divergence(
            student_hidden,
            student,
            teacher_hidden,
            topd.Head(teacher_weight),
            divergence=BY_NAME[workload.loss],
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
        assert isinstance(value, Tensor)
        return value
    ids, probs = workload.targets
    logprobs = topd.linear_logprobs(student_hidden, student, ids, workspace_bytes=workspace_bytes, backend=backend)
    assert isinstance(logprobs, Tensor)
    return -(probs * logprobs).sum(-1)


PEER = of_loss(loss)
