"""What every op carries and runs in: torch's tag that keeps it out of CUDA graphs, and a refusal of a captured stream."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import topd
from topd.ops.shared import op_body as shared
from topd.ops.shared.op_body import op_body, refuse_capture
from topd.ops.transport import op as transport

N, V, H = 4, 9, 3


def ops() -> list[torch._ops.OpOverload]:
    """Return every op of topd that the dispatcher knows."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("topd::")]
    return [getattr(torch.ops.topd, name.removeprefix("topd::")).default for name in names]


def test_every_op_is_kept_out_of_cuda_graphs():
    assert {"linear_divergence", "linear_logprobs_backward", "topk_logprobs", "transport"} <= {
        op.overloadpacket.__name__ for op in ops()
    }
    assert [op for op in ops() if torch.Tag.cudagraph_unsafe not in op.tags] == []


def test_inductor_reads_the_tag():
    """As torch.compile(mode="reduce-overhead") asks it of each node."""
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    graph = torch.fx.Graph()
    for op in ops():
        assert is_cudagraph_unsafe_fx_node(graph.call_function(op))
    assert not is_cudagraph_unsafe_fx_node(graph.call_function(torch.ops.aten.mm.default))


def loss() -> Tensor:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    return topd.linear_divergence(hidden, topd.Head(weight), torch.randn(N, H), topd.Head(torch.randn(V, H))).sum()


def likelihood() -> Tensor:
    weight = torch.randn(V, H, requires_grad=True)
    return topd.linear_logprobs(torch.randn(N, H), topd.Head(weight), torch.zeros(N, 1, dtype=torch.int64)).sum()


def nothing() -> None:
    """Prepare nothing."""


# The op, what comes before the capture, and what is captured.
CALLS: dict[str, tuple[str, Callable[[], object], Callable[[object], object]]] = {
    "divergence": ("linear_divergence", nothing, lambda _: loss()),
    "divergence, backward": ("linear_divergence", loss, lambda value: value.backward()),
    "logprobs": ("linear_logprobs", nothing, lambda _: likelihood()),
    "logprobs, backward": ("linear_logprobs", likelihood, lambda value: value.backward()),
    "topk": ("topk_logprobs", nothing, lambda _: topd.topk_logprobs(torch.randn(N, H), topd.Head(torch.randn(V, H)), 2)),
    "transport": (
        "near_future_divergence",
        nothing,
        lambda _: topd.near_future_divergence(student_vectors=torch.randn(1, 2, H), teacher_vectors=torch.randn(1, 2, H)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_is_refused(name, monkeypatch):
    """What stands for CUDA: CPU tensors count as tensors of a GPU whose stream is being captured."""
    op, prepare, call = CALLS[name]
    prepared = prepare()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for module in (shared, transport):
        monkeypatch.setattr(module, "refuse_capture", lambda what, device: refuse_capture(what, torch.device("cuda")))
    with pytest.raises(RuntimeError, match=rf"^{op} must not be captured into a CUDA graph, got a stream that is being"):
        call(prepared)


def test_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"call it outside torch\.cuda\.graph .* torch\.compile\(mode=\"reduce-overhead\"\)"):
        refuse_capture("linear_divergence", torch.device("cuda"))


def test_a_cpu_call_does_not_ask_and_a_stream_that_is_not_captured_passes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture("linear_divergence", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    with op_body("linear_divergence", torch.device("cpu")):
        assert not torch.is_grad_enabled()
