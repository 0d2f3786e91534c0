"""`inside` in one process: where the forward runs, what goes in and comes out, and what is refused."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fsdp2_cases import BF16, micro_batches, models, sharded
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import topd
from topd.integrations.distributed import head_method, inside
from topd.models.data_parallel import is_in_forward

pytest.importorskip("transformers")


def ways():
    """Return a student wrapped in every way, by name."""
    students = [models()[0] for _ in range(5)]
    return {
        "nothing": students[0],
        "DDP": DistributedDataParallel(students[1]),
        "compiled DDP": torch.compile(DistributedDataParallel(students[2])),
        "FSDP": FullyShardedDataParallel(students[3], device_id=torch.device("cpu")),
        "FSDP2": sharded(students[4], "own unit"),
    }


def test_an_objective_gives_the_same_inside_everything(one_rank):
    batch, expected = micro_batches()[0], None
    for name, model in ways().items():
        teacher = models()[1]
        student = model.module if name == "FSDP" else model
        result = inside(model, topd.OPD(student, teacher), batch)
        result.loss.backward()
        expected = expected or result.loss.item()
        assert isinstance(result, topd.Objective), name
        assert result.loss.item() == pytest.approx(expected, rel=1e-6), name
        assert all(parameter.grad is not None for parameter in model.parameters()), name


def test_the_forward_is_restored_and_the_plain_model_runs(one_rank):
    for name, model in ways().items():
        inner = getattr(model, "module", model)
        ran = inside(model, lambda _, model=model: is_in_forward(model) or is_in_forward(getattr(model, "_orig_mod", model)))
        assert ran == (name != "nothing"), name
        assert "forward" not in vars(inner), name


def test_inputs_are_not_cast(one_rank):
    student = fully_shard(models()[0], mp_policy=BF16)
    weights = torch.rand(3)
    assert inside(student, lambda given: given, weights) is weights


def test_an_error_leaves_the_model_usable(one_rank):
    student, batch = sharded(models()[0], "norm and head"), micro_batches()[0]
    objective = topd.OPD(student, models()[1])
    with pytest.raises(ZeroDivisionError):
        inside(student, lambda _: 1 / 0)
    with (
        pytest.raises(ValueError, match="must be used inside the forward") if False else pytest.raises(ValueError, match="topd")
    ):
        inside(student, lambda _: topd.Head(torch.ones(2)))
    assert not is_in_forward(student)
    inside(student, objective, batch).loss.backward()
    assert student.lm_head.weight.grad.full_tensor().abs().max() > 0


def test_without_gradients_the_head_is_sharded_again(one_rank):
    student, batch = sharded(models()[0], "own unit"), micro_batches()[0]
    objective = topd.OPD(student, models()[1])
    with torch.no_grad():
        inside(student, objective, batch)
    assert hasattr(student.lm_head.weight, "placements")
    loss = inside(student, objective, batch).loss
    assert not hasattr(student.lm_head.weight, "placements")  # whole until the backward pass has ended
    loss.backward(retain_graph=True)
    assert hasattr(student.lm_head.weight, "placements")
    once = student.lm_head.weight.grad.full_tensor().clone()
    loss.backward()
    assert torch.allclose(student.lm_head.weight.grad.full_tensor(), 2 * once, rtol=1e-5)


def test_a_loss_without_a_backward_pass_leaves_nothing_stale(one_rank):
    """Two losses at a time; then a loss that nobody differentiates, and a step of the optimizer before the next."""
    student, batch = sharded(models()[0], "own unit"), micro_batches()[0]
    objective, optimizer = topd.OPD(student, models()[1]), torch.optim.SGD(student.parameters(), lr=1.0)
    first, second = (inside(student, objective, batch).loss for _ in range(2))
    first.backward()
    second.backward()
    assert hasattr(student.lm_head.weight, "placements")
    dropped = inside(student, objective, batch).loss.detach()
    optimizer.step()
    after = inside(student, objective, batch).loss
    (after + inside(student, objective, batch).loss).backward()
    assert hasattr(student.lm_head.weight, "placements")
    assert dropped == pytest.approx(first.item(), rel=1e-6)
    with torch.no_grad():
        assert inside(student, objective, batch).loss == pytest.approx(after.item(), rel=1e-6)
    assert abs(after.item() - first.item()) > 1e-3


@dataclass
class Pair:
    loss: torch.Tensor
    other: int


def test_what_a_forward_returns_comes_back(one_rank):
    student = sharded(models()[0])
    weight = student.model.layers[0].mlp.up_proj.weight

    def pair(_):
        return Pair(student.model.norm.weight.sum(), 3)

    result = inside(student, pair)
    assert result.other == 3
    assert result.loss.requires_grad
    nested = {"a": [torch.ones(1), None, "text", 2.0], "b": (torch.zeros(2),)}
    assert inside(student, lambda _: nested) == nested
    assert student.model.layers[0].mlp.up_proj.weight is weight


def test_what_a_wrapper_would_not_look_into_is_refused(one_rank):
    student = sharded(models()[0])
    with pytest.raises(TypeError, match="or a dataclass with them in its fields, got a SimpleNamespace in it"):
        inside(student, lambda _: SimpleNamespace(loss=student.model.norm.weight.sum()))
    with pytest.raises(TypeError, match="forward must be a function of inputs, got int"):
        inside(student, 3)


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which is not installed: it calls its module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def test_zero_is_told_that_the_forward_reads_the_head(monkeypatch):
    """By the signature of deepspeed.zero.register_external_parameter(module, parameter), before the forward begins."""
    student, told = models()[0], []
    student.lm_head.weight.ds_id = 7
    monkeypatch.setitem(sys.modules, "deepspeed", module := ModuleType("deepspeed"))
    module.zero = SimpleNamespace(register_external_parameter=lambda module, parameter: told.append((module, parameter)))
    result = inside(DeepSpeedEngine(student), topd.OPD(student, models()[1]), micro_batches()[0])
    result.loss.backward()
    assert told == [(student, student.lm_head.weight)]


def test_a_head_that_is_no_unit_has_no_method_of_its_own(one_rank):
    student = fully_shard(models()[0])
    with pytest.raises(ValueError, match=r"lm_head must be a unit of FSDP2, got a Linear that a module around it shards"):
        head_method(student.lm_head)
    with pytest.raises(TypeError, match=r"lm_head must be a torch\.nn\.Module, got Parameter"):
        head_method(nn.Parameter(torch.ones(2)))
    plain = nn.Linear(2, 2)
    assert head_method(plain)(lambda hidden: hidden + 1, 2) == 3
    assert "topd_call" not in vars(plain)
