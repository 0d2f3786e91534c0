"""linear_logprobs through the Triton kernels with gradients of 16 bits that wait for one product, a pile of chunks at a time:
against the same without piles, and against the reference in float64."""

import compare
import pytest
import torch
from compare import TENSORS, Outcome, random_model
from torch import Tensor
from triton_cases import DEVICE, FLOAT32, NEEDS_TRITON, STORED, logprob_outcome

from topd.ops.linear_logprobs import loop as logprobs_loop
from topd.ops.shared.plan import ChunkPlan
from topd.ops.shared.tiles import HeadGrads

pytestmark = NEEDS_TRITON
N, VOCAB, M = 13, 19, 3
# A row's tile takes 32 float32 entries, its gradient 32 of 16 bits: chunks of two rows, in piles of three and more.
PILES = 2 * (32 * 4 + 3 * 32 * 2)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[ChunkPlan]:
    """The plans of the calls that follow."""
    plans: list[ChunkPlan] = []
    plan_of = logprobs_loop.plan_of

    def watched(*arguments, **options) -> ChunkPlan:
        plans.append(plan_of(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(logprobs_loop, "plan_of", watched)
    return plans


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that adds to the head's gradients."""
    rows: list[int] = []
    add = HeadGrads.add

    def watched(self, side, grad_logits, *rest, **options) -> None:
        rows.append(grad_logits.shape[0])
        add(self, side, grad_logits, *rest, **options)

    monkeypatch.setattr(HeadGrads, "add", watched)
    return rows


def outcome(dtype: torch.dtype, backend: str, upstream: list[Tensor], **options) -> Outcome:
    """Every option: bias, adapter, softcap, mask, repeated ids; the reference in float64 on the numbers of dtype."""
    torch.manual_seed(3)
    model = random_model(N, VOCAB, 7, bias=True, rank=2, softcap=8.0, scale=0.8).to(DEVICE).to(dtype)
    ids = torch.randint(VOCAB, (N, M), device=DEVICE)
    ids[:, 2] = ids[:, 1]
    options |= {"temperature": 1.6, "mask": torch.arange(N, device=DEVICE) != 4}
    wide = torch.float64 if backend == "reference" else dtype
    return logprob_outcome(model.to(wide), ids, backend, upstream, wide, **options)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
def test_piles_are_the_chunks_alone(entropy, dtype, plans, sums):
    """One upstream for most rows: forward's sums stand, three rows are added again. Values differ by rounding of
    float32, gradients by that of 16 bits; both agree with float64."""
    upstream = [torch.full((N, M), 0.3, device=DEVICE), *([torch.linspace(0, 1, N, device=DEVICE)] if entropy else [])]
    upstream[0][7:10] *= 2
    piled = outcome(dtype, "triton", upstream, workspace_bytes=PILES)
    assert plans[0].pile > 1
    assert plans[0].pile_count > 1
    assert sums[: plans[0].pile_count] == [pile[-1][1] - pile[0][0] for pile in plans[0].piles()]
    alone = outcome(dtype, "triton", upstream)
    assert plans[-1].chunks == 1
    true = outcome(dtype, "reference", upstream)
    compare.assert_near(piled.value.double(), alone.value.double(), FLOAT32, "value")
    compare.assert_near(piled.value.double(), true.value, FLOAT32, "value")
    for name in TENSORS:
        compare.assert_near(piled.grads[name].double(), alone.grads[name].double(), 4 * torch.finfo(dtype).eps, name)
        compare.assert_near(piled.grads[name].double(), true.grads[name], 2**-7, name)


def test_rows_of_nan_stay_in_their_pile(plans):
    """A row without a distribution, masked out by its upstream, among rows of other chunks of its pile."""
    hidden, weight = torch.randn(N, 7, device=DEVICE).bfloat16(), torch.randn(VOCAB, 7, device=DEVICE).bfloat16()
    ids, upstream = torch.randint(VOCAB, (N, M), device=DEVICE), torch.randn(N, M, device=DEVICE)
    hidden[3], upstream[3] = torch.nan, 0

    def gradients(rows: Tensor) -> tuple[Tensor, Tensor]:
        model = compare.Model(hidden[rows], weight)
        result = logprob_outcome(model, ids[rows], "triton", [upstream[rows]], torch.bfloat16, workspace_bytes=PILES)
        return result.grads["hidden"], result.grads["weight"]

    every, kept = torch.arange(N, device=DEVICE), torch.arange(N, device=DEVICE) != 3
    (states, result), (expected, without) = gradients(every), gradients(every[kept])
    assert plans[0].pile > 1
    assert not states[3].any()
    compare.assert_near(states[kept].double(), expected.double(), FLOAT32, "gradient of hidden")
    compare.assert_near(result.double(), without.double(), 2**-7, "gradient of weight")
