"""Two processes: a student outside its wrapper's forward is refused, inside it the gradients are the whole batch's."""

import pytest
import torch
from compare import assert_near
from tiny_models import flat_gradient
from two_ranks import start

import topd

pytestmark = pytest.mark.slow  # two processes that import everything

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process saved."""
    return start("models/data_parallel_processes.py", tmp_path_factory.mktemp("processes"), timeout=300)


@pytest.mark.parametrize(
    ("way", "wrapper"),
    [
        ("ddp", "DistributedDataParallel"),
        ("ddp topd", "DistributedDataParallel"),
        ("ddp compiled", "DistributedDataParallel"),
        ("ddp.module", "DistributedDataParallel"),
        ("ddp.module after an evaluation", "DistributedDataParallel"),
        ("ddp.module after a step inside", "DistributedDataParallel"),
        ("fsdp1", "FullyShardedDataParallel"),
        ("fsdp2", "FSDPLlamaDecoderLayer"),
        ("fsdp2 after a step", "FSDPLlamaDecoderLayer"),
        ("deepspeed", "DeepSpeedEngine"),
    ],
)
def test_a_student_outside_its_wrappers_forward_is_refused(results, way, wrapper):
    for each in results:
        message = each["messages"][way]
        assert message.startswith("student must be used inside the forward of its data-parallel wrapper")
        assert f"got a {wrapper} whose forward is not running" in message
        assert "class Loss(torch.nn.Module):" in message
        assert "return self.objective(batch).loss" in message


def test_hidden_states_are_refused_there_too(results):
    for each in results:
        message = each["messages"]["hidden_states"]
        assert message.startswith("model must be used inside the forward of its data-parallel wrapper")


@pytest.mark.parametrize(("way", "name"), [("fsdp2 root alone", "Llama"), ("fsdp2 student inside", "FSDPLlama")])
def test_a_head_that_stays_sharded_is_refused_with_the_same_recipe(results, way, name):
    for each in results:
        message = each["messages"][way]
        assert message.startswith(f"student must hold its whole head while the loss runs, got a DTensor in {name}ForCausalLM")
        assert "topd.integrations.distributed.inside(model, objective, batch)" in message
        assert "class Loss(torch.nn.Module):" in message


@pytest.mark.parametrize("way", ["no ddp any more", "frozen", "a group of one"])
def test_where_nothing_is_to_be_exchanged_it_passes(results, way):
    assert [each["messages"][way] for each in results] == ["", ""]


def test_without_gradients_a_wrapper_passes(results):
    for each in results:
        wrapped, plain = each["values"]
        assert torch.equal(wrapped, plain)


@pytest.mark.parametrize(
    "way",
    [
        "ddp",
        "ddp with an empty part",
        "in the student's own forward",
        "fsdp1",
        "replicate",
        "fsdp2",
        "fsdp2 through the trainer's wrapper",
    ],
)
def test_inside_it_the_gradient_is_the_whole_batchs(results, way):
    from trainer_cases import four_rollouts, models

    student, teacher = models()
    topd.OPD(student, teacher)(four_rollouts()).loss.backward()
    for each in results:
        assert_near(each["gradients"][way], flat_gradient(student), 1e-9)


@pytest.mark.parametrize("way", ["ddp topd", "fsdp2 topd"])
def test_topds_gradient_is_that_of_the_parts_one_after_the_other(results, way):
    from data_parallel_processes import TOPD, part_of
    from trainer_cases import four_rollouts, models

    student, teacher = models()
    batch = four_rollouts()
    for rank in range(2):
        part = part_of(batch, rank)
        topd.TOPD(student, teacher, TOPD)(part, num_items=batch["response_mask"].sum()).loss.backward()
    for each in results:
        assert_near(each["gradients"][way], flat_gradient(student), 1e-9)
