"""gate="low_loss_q3": a candidate diverges where its distance is above the upper quartile of those at tokens of low loss."""

import pytest
import torch
from objective_cases import batch_of, models
from topd_cases import FEW, GREEDY

import topd
from topd.objectives.look_ahead import lowest


def test_the_literal_rule():
    reference = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])  # upper quartile 0.3
    distance = torch.tensor([0.1, 0.3, 0.31])
    assert topd.divergent(distance, rule="low_loss_q3", reference=reference).tolist() == [False, False, True]
    assert topd.divergent(distance, rule="low_loss_q3", reference=reference[:0]).all()
    interpolated = torch.tensor([0.0, 1.0])  # 0.75
    assert topd.divergent(torch.tensor([0.74, 0.76]), rule="low_loss_q3", reference=interpolated).tolist() == [False, True]


def test_what_is_refused():
    distance = torch.tensor([0.1])
    with pytest.raises(ValueError, match='reference must be given where rule is "low_loss_q3", got None'):
        topd.divergent(distance, rule="low_loss_q3")
    with pytest.raises(ValueError, match="value must be left out"):
        topd.divergent(distance, rule="low_loss_q3", reference=distance, value=0.5)
    with pytest.raises(ValueError, match="gate_value must be left out"):
        topd.TOPDConfig(gate="low_loss_q3", gate_value=0.5)


def test_the_lowest_scores_are_as_many_as_the_candidates_of_their_row_and_none_of_them():
    score = torch.tensor([[9.0, 1.0, 5.0, 0.5, 7.0], [1.0, 1.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0]])
    response = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    positions = torch.tensor([[0, 4], [0, 2], [2, 0], [2, 1]])
    assert lowest(score, response, positions).tolist() == [[0, 1], [0, 3], [2, 2]]
    assert lowest(score, response, positions[:0]).tolist() == []


def test_the_objective_compares_with_windows_at_tokens_of_low_loss():
    """Greedy windows do not depend on the others that are drawn with them."""
    student, teacher = models()
    options = {**FEW, **GREEDY, "candidate_value": 2}
    batch = batch_of()
    result = topd.TOPD(student, teacher, topd.TOPDConfig(**options, gate="low_loss_q3"))(batch)
    near = result.near_future
    plain = topd.TOPD(student, teacher, topd.TOPDConfig(**options, gate="threshold", gate_value=0.0))(batch).near_future
    assert torch.equal(near.windows.positions, plain.windows.positions)
    assert torch.equal(near.windows.teacher_tokens, plain.windows.teacher_tokens)
    assert torch.equal(near.transport.plan, plain.transport.plan)

    low = lowest(near.score, batch["response_mask"].bool(), near.windows.positions)
    horizon = options["horizon"]
    windows = topd.sample_windows(
        student, teacher, batch["input_ids"], batch["attention_mask"], low, horizon=horizon, temperature=0.0
    )
    lengths = {"student_lengths": windows.student_lengths, "teacher_lengths": windows.teacher_lengths}
    table = student.get_input_embeddings().weight.detach()
    reference = topd.near_future_divergence(windows.student_tokens, windows.teacher_tokens, table, **lengths).distance
    expected = topd.divergent(near.transport.distance, rule="low_loss_q3", reference=reference)
    assert torch.equal(near.divergent, expected)
    with pytest.raises(ValueError, match='windows must be None with gate "low_loss_q3"'):
        topd.TOPD(student, teacher, topd.TOPDConfig(**options, gate="low_loss_q3"))(batch, windows=near.windows)


def test_without_a_response_nothing_is_drawn():
    student, teacher = models()
    batch = batch_of()
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    result = topd.TOPD(student, teacher, topd.TOPDConfig(**{**FEW, **GREEDY}, gate="low_loss_q3"))(batch)
    assert result.loss.item() == 0
    assert result.near_future.windows.positions.shape == (0, 2)
