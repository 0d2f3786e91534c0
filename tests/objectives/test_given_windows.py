"""topd.TOPD(...)(batch, windows=...): windows of another engine or a file in the place of those that the objective draws."""

import io
from dataclasses import fields, replace

import pytest
import torch
from objective_cases import backward, batch_of, models
from tiny_models import VOCAB, tiny
from topd_cases import FEW, step

import topd

ROLLOUT = {"student_window": "rollout"}
KINDS = [{}, ROLLOUT, {"embedding": "student_hidden"}, {"false_alarms": "cap"}, {"guidance_reduction": "tokens"}]


def given(student, teacher, windows, batch=None, **options):
    config = topd.TOPDConfig(**(FEW | options))
    return topd.TOPD(student, teacher, config)(batch_of() if batch is None else batch, windows=windows)


def changed(windows, index, **values):
    """Exchange entries of a copy of windows' tensors."""
    tensors = {name: getattr(windows, name).clone() for name in values}
    for name, value in values.items():
        tensors[name][index] = value
    return replace(windows, **tensors)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_its_own_windows_give_the_same_loss_and_gradients(options):
    student, teacher = models()
    own = step(student, teacher, batch_of(), **options)
    gradient = backward(student, own.loss)
    again = given(student, teacher, own.near_future.windows, **options)
    assert again.loss.item() == own.loss.item()
    assert torch.equal(backward(student, again.loss), gradient)
    assert torch.equal(again.near_future.divergent, own.near_future.divergent)
    others = {name for name in own.metrics if not name.startswith("seconds_")}
    assert all(torch.equal(again.metrics[name], own.metrics[name]) for name in others)
    assert set(again.metrics) == set(own.metrics)
    assert again.metrics["seconds_teacher_windows"] == 0


def test_nothing_is_chosen_and_nothing_is_sampled():
    """One forward of each model and the student's over the divergent windows; the generator stays where it was."""
    student, teacher = models()
    windows, calls = step(student, teacher, batch_of()).near_future.windows, {"student": 0, "teacher": 0}
    for name, model in (("student", student), ("teacher", teacher)):
        model.model.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    config = topd.TOPDConfig(**FEW, gate="threshold", gate_value=-1.0)
    few = replace(windows, **{f.name: getattr(windows, f.name)[[7, 2]] for f in fields(windows) if "way" not in f.name})
    objective = topd.TOPD(student, teacher, config)(batch_of(), windows=few, generator=generator)
    assert calls == {"student": 2, "teacher": 1}
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(objective.near_future.windows.positions, windows.positions[[7, 2]])
    assert objective.metrics["candidates"] == objective.metrics["divergent_points"] == 2


def test_windows_of_a_file_and_of_another_width():
    """Tokens past the lengths are never read; K may be the engine's own and another for each model."""
    student, teacher = models()
    windows = step(student, teacher, batch_of(), eos_token_id=list(range(0, VOCAB, 4))).near_future.windows
    expected = given(student, teacher, windows)
    gradient = backward(student, expected.loss)
    file = io.BytesIO()
    torch.save({field.name: getattr(windows, field.name) for field in fields(windows)}, file)
    file.seek(0)
    loaded = topd.Windows(**torch.load(file))
    past = torch.arange(6) >= loaded.student_lengths.unsqueeze(-1)
    assert past.any()
    wide = torch.nn.functional.pad(loaded.student_tokens.masked_fill(past, -100), (0, 3), value=10**6)
    past = torch.arange(6) >= loaded.teacher_lengths.unsqueeze(-1)
    loaded = replace(loaded, student_tokens=wide, teacher_tokens=loaded.teacher_tokens.masked_fill(past, -1))
    objective = given(student, teacher, loaded)
    assert objective.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(backward(student, objective.loss), gradient, rtol=1e-4, atol=1e-6)


def test_windows_made_under_inference_mode_train():
    student, teacher = models()
    with torch.inference_mode():
        windows = topd.sample_windows(
            student,
            teacher,
            *[batch_of()[key] for key in ("input_ids", "attention_mask")],
            torch.tensor([[0, 10], [2, 8]]),
            horizon=6,
        )
    objective = given(student, teacher, windows, gate="threshold", gate_value=-1.0)
    assert backward(student, objective.loss).isfinite().all()


def test_no_window_is_opd():
    student, teacher = models()
    windows = step(student, teacher, batch_of(), candidates="threshold", candidate_value=1e9).near_future.windows
    objective, expected = given(student, teacher, windows), topd.OPD(student, teacher)(batch_of())
    assert objective.loss.item() == expected.loss.item()
    assert torch.equal(backward(student, objective.loss), backward(student, expected.loss))
    empty = {key: value[:0] for key, value in batch_of().items()}
    assert given(student, teacher, windows, empty).loss == 0


def test_a_rollouts_windows_may_be_shorter():
    student, teacher = models()
    windows = step(student, teacher, batch_of(), **ROLLOUT).near_future.windows
    shorter = replace(windows, student_lengths=windows.student_lengths.clamp_max(2))
    assert given(student, teacher, shorter, **ROLLOUT).loss.isfinite()


REFUSED = {
    "type": (lambda w: {"positions": w.positions}, TypeError, "windows must be a topd.Windows, got dict"),
    "prompt": (
        lambda w: changed(w, 1, positions=torch.tensor([0, 8])),
        ValueError,
        r"positions must be response tokens, where response_mask is True, got \[0, 8\] \(index 1\)",
    ),
    "outside": (lambda w: changed(w, 0, positions=torch.tensor([3, 9])), ValueError, r"positions must lie in input_ids"),
    "twice": (lambda w: changed(w, 2, positions=w.positions[0]), ValueError, r"positions must be distinct, got .* \(index 2\)"),
    "int32": (lambda w: replace(w, positions=w.positions.int()), TypeError, "positions must be torch.int64"),
    "flat": (lambda w: replace(w, positions=w.positions[:, 0]), ValueError, r"positions must be \[m, 2\]"),
    "few rows": (
        lambda w: replace(w, teacher_tokens=w.teacher_tokens[1:]),
        ValueError,
        r"windows.teacher_tokens must be \[9, K\], a row for each position and K from 1 to 128, got \[8, 6\]",
    ),
    "no column": (lambda w: replace(w, student_tokens=w.student_tokens[:, :0]), ValueError, r"student_tokens must be \[9, K\]"),
    "too wide": (
        lambda w: replace(w, student_tokens=w.student_tokens.repeat(1, 22)),
        ValueError,
        r"K from 1 to 128, got \[9, 132\]",
    ),
    "float": (
        lambda w: replace(w, teacher_tokens=w.teacher_tokens.float()),
        TypeError,
        "windows.teacher_tokens must be torch.i",
    ),
    "length 0": (lambda w: changed(w, 3, teacher_lengths=0), ValueError, r"windows.teacher_lengths must lie in \[1, 6\], the"),
    "length 7": (lambda w: changed(w, 3, student_lengths=7), ValueError, r"windows.student_lengths must lie in \[1, 6\], the"),
    "lengths": (
        lambda w: replace(w, student_lengths=w.student_lengths[:8]),
        ValueError,
        r"windows.student_lengths must have shape \[9\]",
    ),
    "negative": (
        lambda w: changed(w, (4, 1), student_tokens=-1),
        ValueError,
        rf"windows.student_tokens must lie in \[0, {VOCAB}\), the tokens that the student has, .* got -1 at \[4, 1\]; let",
    ),
    "unknown": (
        lambda w: changed(w, (4, 1), teacher_tokens=VOCAB),
        ValueError,
        rf"windows.teacher_tokens must lie in \[0, {VOCAB}\), the tokens that both models have, .* got {VOCAB} at \[4, 1\]",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_the_batch_is_refused(change, error, message):
    student, teacher = models()
    windows = step(student, teacher, batch_of()).near_future.windows
    with pytest.raises(error, match=message):
        given(student, teacher, change(windows))


def test_the_teachers_tokens_are_those_that_both_models_have():
    student, teacher = models()
    windows = step(student, teacher, batch_of()).near_future.windows
    student = tiny("llama", vocab_size=VOCAB - 1)
    sides = ("student_tokens", "teacher_tokens")
    windows = replace(windows, **{name: getattr(windows, name).clamp_max(VOCAB - 2) for name in sides})
    batch = batch_of() | {"input_ids": batch_of()["input_ids"].clamp_max(VOCAB - 2)}
    objective = topd.TOPD(student, teacher, topd.TOPDConfig(**FEW), allow_unequal_vocabularies=True)
    assert objective(batch, windows=windows).loss.isfinite()
    with pytest.raises(ValueError, match=rf"must lie in \[0, {VOCAB - 1}\), the tokens that both"):
        objective(batch, windows=changed(windows, (4, 1), teacher_tokens=VOCAB - 1))


@pytest.mark.parametrize("what", ["another token", "past the response", "a tool's output"])
def test_with_rollout_windows_the_students_tokens_are_the_rollouts(what):
    student, teacher = models()
    batch = batch_of()
    windows = step(student, teacher, batch, **ROLLOUT).near_future.windows
    row, column = windows.positions[0].tolist()
    if what == "another token":
        windows = changed(windows, (0, 0), student_tokens=(int(windows.student_tokens[0, 0]) + 1) % VOCAB)
    elif what == "past the response":
        windows = changed(windows, 0, student_lengths=int(windows.student_lengths[0]) + 1)
        windows = replace(windows, student_tokens=torch.nn.functional.pad(windows.student_tokens, (0, 1)))
    else:
        batch["response_mask"][row, column + 1] = 0
    rule = "positions must have the rollout's own tokens in windows.student_tokens, up to the response's end, with student_wind"
    with pytest.raises(ValueError, match=rf'{rule}.* \(index 0\); copy them from input_ids, or take student_window="regen'):
        given(student, teacher, windows, batch, **ROLLOUT)
    if what == "another token":
        assert given(student, teacher, windows, batch).loss.isfinite()
