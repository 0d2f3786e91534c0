"""TOPDConfig(guidance_reduction=): the mean over points, or the sum over tokens, which is additive over micro-batches."""

import pytest
import torch
from compare import assert_near
from objective_cases import backward, batch_of, models
from topd_cases import FEW, GREEDY, step

import topd

EACH_ALONE = {"gate": "threshold", "gate_value": 0.85}


def uneven():
    """Three responses of 10, 5 and 11 tokens."""
    batch = batch_of()
    batch["response_mask"][0, 9] = 0
    batch["response_mask"][1, :10] = 0
    return batch


def guidance_of_each_point(student, teacher, batch):
    """Return the row and the L_traj of each divergent point, by a step with this point's window alone."""
    near = step(student, teacher, batch, **GREEDY, **EACH_ALONE).near_future
    losses, windows = [], near.windows
    for index in near.divergent.nonzero()[:, 0]:
        chosen = index.unsqueeze(0)
        names = ("positions", "student_tokens", "teacher_tokens", "student_lengths", "teacher_lengths")
        one = topd.Windows(**{name: getattr(windows, name)[chosen] for name in names})
        objective = topd.TOPD(student, teacher, topd.TOPDConfig(**FEW, **EACH_ALONE))(batch, windows=one)
        losses.append((int(windows.positions[index, 0]), objective.metrics["guidance_loss"].item()))
    return losses


@pytest.mark.parametrize("num_items", [None, 50])
def test_values_by_hand(num_items):
    student, teacher = models()
    batch = uneven()
    losses = guidance_of_each_point(student, teacher, batch)
    values = [value for _, value in losses]
    assert 3 < len(values) < 9
    counts = batch["response_mask"].sum(-1).tolist()
    assert counts == [10, 5, 11]
    items = {"token": num_items or 26, "sequence": num_items or 3}
    expected = {
        ("points", "token"): sum(values) / len(values) * 26 / items["token"],
        ("points", "sequence"): sum(values) / len(values) * 3 / items["sequence"],
        ("tokens", "token"): sum(values) / items["token"],
        ("tokens", "sequence"): sum(value / counts[row] for row, value in losses) / items["sequence"],
    }
    for (guidance, reduction), value in expected.items():
        config = topd.TOPDConfig(**FEW, **GREEDY, **EACH_ALONE, guidance_reduction=guidance, reduction=reduction)
        objective = topd.TOPD(student, teacher, config)(batch, num_items=num_items)
        assert objective.metrics["guidance_loss"] == pytest.approx(value, rel=1e-5)
        total = objective.metrics["opd_loss"] + 0.1 * objective.metrics["guidance_loss"]
        assert objective.loss.item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("own", [GREEDY, {"window_noise": "shared", "gate_value": 0.4}], ids=["greedy", "shared noise"])
def test_micro_batches_add_up_to_the_whole(reduction, own):
    """In value and gradient, where the gate judges each candidate by itself; "points" does not."""
    student, teacher = models()
    batch, gradients, losses = uneven(), {}, {}
    items = batch["response_mask"].sum() if reduction == "token" else 3
    for guidance in ("tokens", "points"):
        options = {**FEW, **EACH_ALONE, **own, "reduction": reduction, "guidance_reduction": guidance, "guidance_weight": 1.0}
        objective = topd.TOPD(student, teacher, topd.TOPDConfig(**options))
        whole = objective(batch, generator=torch.Generator().manual_seed(5))
        gradients["whole"], losses["whole"] = backward(student, whole.loss).double(), whole.loss.item()
        parts = []
        for row in range(3):
            part = {key: value[row : row + 1] for key, value in batch.items()}
            parts.append(objective(part, num_items=items, generator=torch.Generator().manual_seed(5)).loss)
        if guidance == "tokens":
            assert sum(parts).item() == pytest.approx(losses["whole"], rel=1e-5)
            assert_near(backward(student, sum(parts)), gradients["whole"], 1e-4, "gradient")
        else:
            assert sum(parts).item() != pytest.approx(losses["whole"], rel=1e-3)


def test_no_divergent_point_adds_nothing():
    student, teacher = models()
    objective = step(student, teacher, batch_of(), gate="threshold", gate_value=1e9, guidance_reduction="tokens")
    assert objective.metrics["guidance_loss"] == 0
    assert objective.loss.item() == topd.OPD(student, teacher)(batch_of()).loss.item()
