"""topd.plan says what a call of linear_divergence then does."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import topd
from topd.ops.linear_divergence import loop as divergence_loop
from topd.ops.shared.plan import ChunkPlan

V, H = 3000, 48
MIB, GIB = 1 << 20, 1 << 30
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(
    dtype: torch.dtype, *, trainable: bool = True, device: str = "cpu", vocab: int = V, width: int = H
) -> list[topd.Head]:
    """A student's head and a wider teacher's."""
    student = torch.randn(vocab, width, device=device).to(dtype).requires_grad_(trainable)
    return [topd.Head(student), topd.Head(torch.randn(vocab + 8, width + 16, device=device).to(dtype))]


def call(student: topd.Head, teacher: topd.Head, n: int, **options) -> None:
    """Forward and backward of a mean."""
    hidden, other = (torch.randn(n, head.weight.shape[1]).to(head.weight.dtype) for head in (student, teacher))
    topd.linear_divergence(hidden.requires_grad_(), student, other, teacher, **options).mean().backward()


def peak_of(run) -> int:
    """Return the most bytes that run() has allocated at a time, by torch's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[ChunkPlan]:
    """The plans of the loops that follow."""
    seen: list[ChunkPlan] = []
    tiles = divergence_loop.TileLoop

    def watched(engine, plan: ChunkPlan, *rest, **options):
        seen.append(plan)
        return tiles(engine, plan, *rest, **options)

    monkeypatch.setattr(divergence_loop, "TileLoop", watched)
    return seen


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "workspace_bytes"), [(20, None), (700, 4 * MIB), (700, None), (0, None)])
def test_the_chunks_are_those_of_the_call(n, workspace_bytes, dtype, trainable, plans):
    student, teacher = heads(dtype, trainable=trainable)
    plan = topd.plan(student, teacher, n, workspace_bytes=workspace_bytes)
    call(student, teacher, n, workspace_bytes=workspace_bytes)
    chunks = plans[0]
    assert (plan.tokens, plan.rows, plan.chunks, plan.pile) == (n, chunks.rows, chunks.chunks, chunks.pile)
    assert plan.workspace_bytes == chunks.workspace_bytes <= (workspace_bytes or 512 * MIB)
    assert plan.flop == 2 * n * V * (H * (2 + trainable) + H + 16)
    assert (plan.vocab, plan.device.type, plan.memory_known) == (V, "cpu", True)


@pytest.mark.cpp
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "workspace_bytes"), [(20, None), (900, 4 * MIB), (900, None)])
def test_the_peak_is_what_is_measured(n, workspace_bytes, dtype, trainable):
    """Within 5 % of what torch allocates, inputs apart, the weights large enough to be most of it."""
    student, teacher = heads(dtype, trainable=trainable)
    plan = topd.plan(student, teacher, n, workspace_bytes=workspace_bytes)
    inputs = n * (2 * H + 16) * (4 + dtype.itemsize)  # drawn in float32
    measured = peak_of(lambda: call(student, teacher, n, workspace_bytes=workspace_bytes))
    assert measured - inputs <= 1.05 * plan.peak_bytes
    assert plan.peak_bytes <= 1.05 * measured
    assert plan.kept_bytes + plan.workspace_bytes // 2 <= plan.peak_bytes
    assert plan.grad_bytes == (n * H + V * H * trainable) * dtype.itemsize


def models_heads(dtype: torch.dtype = torch.bfloat16, *, trainable: bool = True) -> list[topd.Head]:
    """Heads of 151,936 tokens without data."""
    return heads(dtype, trainable=trainable, device="meta", vocab=151_936, width=4096)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_here():
    """Its memory is not known: 4,096 rows, by the Triton kernels, as the print says."""
    plan = topd.plan(*models_heads(), 8192, device="cuda")
    assert (plan.rows, plan.chunks, plan.pile, plan.backend) == (4096, 2, 2, "triton")
    assert (plan.product_dtype, plan.memory_known) == (torch.bfloat16, False)
    assert 6 * GIB < plan.workspace_bytes < 8 * GIB
    weight, states = 151_936 * 4096, 8192 * 4096
    assert plan.grad_bytes == 2 * (weight + states)
    assert plan.kept_bytes == 4 * (weight + states + 2 * 8192)
    assert plan.peak_bytes > plan.kept_bytes + plan.workspace_bytes
    for word in ("8,192 tokens", "151,936", '"triton"', "2 of up to 4,096 rows", "2 chunks to a product", "not known", "GiB"):
        assert word in str(plan)
    bounded = topd.plan(*models_heads(), 8192, device="cuda", workspace_bytes=GIB)
    assert bounded.workspace_bytes <= GIB
    assert bounded.chunks > 8
    frozen = topd.plan(*models_heads(trainable=False), 8192, device=torch.device("cuda", 1))
    assert (frozen.grad_bytes, frozen.kept_bytes) == (2 * states, 4 * (states + 8192))
    assert frozen.flop * 9 < plan.flop * 8


@pytest.mark.usefixtures("no_gpu")
def test_the_dtype_is_that_of_both_sides():
    plan = topd.plan(*models_heads(torch.float32), 100, device="cuda", dtype=torch.bfloat16)
    assert plan == topd.plan(*models_heads(torch.bfloat16), 100, device="cuda")
    assert topd.plan(*models_heads(torch.float32), 100, device="cuda").product_dtype == torch.float32


def test_a_model_stands_for_its_head():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    head = topd.Head.from_model(model)
    assert topd.plan(model, model, 30) == topd.plan(head, head, 30)
    assert topd.plan(model, model, 30).grad_bytes == 4 * 16 * (60 + 30)


def refused(**wrong) -> None:
    given = dict(zip(("student", "teacher"), heads(torch.float32), strict=True)) | {"tokens": 10} | wrong
    topd.plan(given.pop("student"), given.pop("teacher"), given.pop("tokens"), **given)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"student": torch.zeros(2, 2)}, TypeError, ["student", "topd.Head", "Tensor"]),
        ({"teacher": None}, TypeError, ["teacher", "topd.Head", "NoneType"]),
        ({"tokens": 3.0}, TypeError, ["tokens", "int", "float"]),
        ({"tokens": True}, TypeError, ["tokens", "int", "bool"]),
        ({"tokens": -1}, ValueError, ["tokens", ">= 0", "-1"]),
        ({"device": "gpu"}, ValueError, ["device", "'gpu'"]),
        ({"device": 0}, TypeError, ["device", "int"]),
        ({"device": "meta"}, ValueError, ["device", "meta", "cuda"]),
        ({"dtype": torch.int64}, ValueError, ["dtype", "torch.float32", "torch.int64"]),
        ({"workspace_bytes": 0}, ValueError, ["workspace_bytes", "> 0", "0"]),
        ({"workspace_bytes": 100}, ValueError, ["workspace_bytes", "at least one row", "100"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(wrong, error, words):
    with pytest.raises(error) as raised:
        refused(**wrong)
    assert all(word in str(raised.value) for word in words)


def test_nothing_is_read_or_kept() -> None:
    """No gradient reaches the heads, no tensor is held."""
    student, teacher = heads(torch.float32)
    plan = topd.plan(student, teacher, 30)
    assert student.weight.grad is None
    assert not any(isinstance(value, Tensor) for value in vars(plan).values())
    with torch.no_grad():
        assert topd.plan(student, teacher, 30) == plan
