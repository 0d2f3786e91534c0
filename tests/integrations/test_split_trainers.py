"""Both trainers on models that transformers has split over two ranks: the steps of one process, the same rollouts on both."""

import pytest
import torch
from compare import assert_near
from diagnostics_cases import diagnostics_of
from tiny_trl_cases import topd_by_trl, two_steps_by_trl
from trainer_cases import METHODS, flat, models, three_steps
from two_ranks import start

from topd.integrations.processes import Processes, refuse_split_sequences

distributed = pytest.importorskip("transformers.distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, model in zip(("student", "teacher"), models(), strict=True):
        model.save_pretrained(folder / name)
    return start("integrations/split_trainers.py", folder, timeout=120)


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_by_transformers(method, ranks, tmp_path):
    trainer = three_steps(method, tmp_path, *models())
    trainer.train()
    for rank in ranks:
        assert_as_in_one_process(rank["by_transformers"][method], trainer)


@pytest.mark.parametrize("method", ["trd", "topd"])
def test_two_steps_by_trl(method, ranks, tmp_path):
    """Their diagnostics count each token once."""
    trainer = two_steps_by_trl(tmp_path, models()) if method == "trd" else topd_by_trl(tmp_path, models(), steps=2)
    trainer.train()
    for rank in ranks:
        assert_as_in_one_process(rank["by_trl"][method], trainer)


def assert_as_in_one_process(each, trainer):
    assert_near(each["parameters"], flat(trainer.objective.student), 1e-10, "parameters")
    for line, expected in zip(each["log"], trainer.state.log_history, strict=False):
        if "loss" in expected:
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert line.get("guidance_loss", 0.0) == pytest.approx(expected.get("guidance_loss", 0.0), rel=1e-5)
            assert diagnostics_of(line) == pytest.approx(diagnostics_of(expected), rel=1e-9)


def test_trl_would_leave_rows_out_with_accumulation(ranks):
    for rank in ranks:
        assert "args.gradient_accumulation_steps must be 1 with tensor parallelism, got 2" in rank["by_trl"]["refusal"]


@pytest.mark.parametrize("way", ["by_transformers_with_rollouts_of_its_own", "by_trl_with_rollouts_of_its_own"])
def test_both_ranks_sample_the_same_rollouts(way, ranks):
    """Others are refused: hidden states are the same on all ranks of a head."""
    first, second = (rank[way] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert (first["parameters"] - flat(models()[0])).abs().max() > 1e-3
    if "draws" in first:
        assert torch.equal(first["draws"], second["draws"])


class Trainer:
    """What is read of a trainer of four processes, by twos of which tensor parallelism splits the models."""

    def __init__(self, **sizes):
        self.accelerator = type(
            "Accelerator", (), {"num_processes": 4, "process_index": 3, "gather": lambda self, value: value}
        )()
        for name, size in sizes.items():
            setattr(self, name, lambda size=size: size)


def test_which_processes_have_which_part():
    processes = Processes(Trainer(get_tp_size=2))
    assert (processes.same, processes.parts, processes.part) == (2, 2, 1)
    assert processes.gather(torch.tensor([1, 1, 2, 2])).tolist() == [1, 2]
    alone = Processes(Trainer())
    assert (alone.same, alone.parts, alone.part) == (1, 4, 3)
    assert alone.group() is None
    refuse_split_sequences(Trainer(get_tp_size=2))
    for size in ("get_cp_size", "get_sp_size"):
        with pytest.raises(ValueError, match="Trainer knows no context and no sequence parallelism, got it in args"):
            refuse_split_sequences(Trainer(**{size: 2}))
