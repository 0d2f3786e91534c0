"""What is read of FSDP2 by names that torch does not publish: another torch is named; heads that stay sharded are refused."""

from types import SimpleNamespace

import pytest
import torch
from fsdp2_cases import models, sharded
from tiny_models import tiny
from torch.distributed.fsdp import fully_shard

import topd
from topd.models.data_parallel import is_in_forward
from topd.models.fsdp2_state import groups_of, is_sharded_by_fsdp
from topd.models.in_step import in_step

INSIDE = r"topd\.integrations\.distributed\.inside\(model, forward, inputs\)"
ANOTHER = rf"FSDP2 .* names of torch 2\.13 that are not public; torch {torch.__version__.replace('+', '.')} has others: .*"


def test_a_torch_that_keeps_its_shards_elsewhere_is_named(monkeypatch):
    monkeypatch.delattr("torch.distributed._composable_state._module_state_mapping")
    with pytest.raises(RuntimeError, match=ANOTHER + "_module_state_mapping.*; install torch 2.13, or a topd that names torch"):
        is_sharded_by_fsdp(SimpleNamespace(placements=()))
    assert not is_sharded_by_fsdp(torch.ones(2))  # nothing is read of what is no DTensor


@pytest.mark.parametrize("missing", ["_get_fsdp_state", "_fsdp_param_groups", "_state_ctx"])
def test_a_torch_whose_units_have_other_names_is_named(one_rank, monkeypatch, missing):
    unit = fully_shard(torch.nn.Linear(2, 2))
    if missing == "_get_fsdp_state":
        monkeypatch.delattr("torch.distributed.fsdp.FSDPModule._get_fsdp_state")
    else:
        monkeypatch.delattr(unit._get_fsdp_state(), missing)
    read = is_in_forward if missing == "_state_ctx" else groups_of
    with pytest.raises(RuntimeError, match=ANOTHER + missing):
        read(unit)


def test_what_fsdp2_shards_is_told_from_what_it_gathers(one_rank):
    layer = fully_shard(torch.nn.Linear(3, 5, bias=False))
    assert is_sharded_by_fsdp(layer.weight)
    layer.unshard()
    assert not is_sharded_by_fsdp(layer.weight)
    with in_step(layer, layer) as step:
        assert step.zero == 0.0


@pytest.mark.parametrize("place", ["root", "norm and head", "own unit"])
def test_a_head_that_fsdp2_still_shards_is_refused(one_rank, place):
    student = sharded(models()[0], place)
    with pytest.raises(ValueError, match=rf"Head\.weight must not be sharded by FSDP2 while the loss runs, .*{INSIDE}"):
        topd.Head(student.lm_head.weight)
    with pytest.raises(
        ValueError, match=rf"must hold the whole weight of its head .* got a DTensor .*{INSIDE}.*grad_placements"
    ):
        topd.Head.from_model(student)


def test_a_head_that_fsdp1_or_zero_still_shards_is_refused():
    """FSDP1 leaves a part of a flat parameter, ZeRO-3 nothing at all."""
    with pytest.raises(ValueError, match=rf"Head\.weight must be \[V, H\] .* got \[50\]; FSDP and ZeRO-3 gather .*{INSIDE}"):
        topd.Head(torch.nn.Parameter(torch.empty(50)))
    with pytest.raises(ValueError, match=rf"got \[0\]; FSDP and ZeRO-3 gather a sharded head .*{INSIDE}"):
        topd.Head(torch.nn.Parameter(torch.empty(0)))
    student = tiny("llama")
    student.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"got shape \[0\] \(sharded by ZeRO-3 or FSDP\?\) .*{INSIDE}"):
        topd.Head.from_model(student)
