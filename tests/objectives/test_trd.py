"""topd.TRD: OPD's machinery that demands a teacher's side; TRDConfig and OPSDConfig, their defaults and refusals."""

import dataclasses

import pytest
import torch
from objective_cases import backward
from pair_cases import batch_of, models

import topd

CONFIGS = {
    "TRD": topd.TRDConfig(divergence=topd.JSD(0.3), reduction="sequence", top_k=8),
    "OPSD": topd.OPSDConfig(teacher="ema", ema_decay=0.9),
    "OPD": topd.OPDConfig("forward_kl", position_clip=0.1),
    "TOPD": topd.TOPDConfig(top_k=8, position_clip=2.0),
}


def test_the_defaults_are_the_papers():
    plain = dataclasses.asdict(topd.OPDConfig())
    assert dataclasses.asdict(topd.TRDConfig()) == plain | {"divergence": "forward_kl"}
    clip = {"name": "forward_kl", "entry_clip": 0.05}
    assert dataclasses.asdict(topd.OPSDConfig()) == plain | {"divergence": clip, "teacher": "initial", "ema_decay": 0.999}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_asdict(name):
    config = CONFIGS[name]
    assert type(config)(**dataclasses.asdict(config)) == config


def test_trd_is_opd_with_the_forward_kl():
    student, teacher = models()
    step = topd.TRD(student, teacher)(batch_of())
    gradient = backward(student, step.loss)
    expected = topd.OPD(student, teacher, topd.OPDConfig("forward_kl"))(batch_of())
    assert torch.equal(step.loss, expected.loss)
    assert torch.equal(gradient, backward(student, expected.loss))
    assert step.near_future is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("layout", ["pair", "packed"])
def test_the_missing_key_is_named(layout):
    student, teacher = models()
    batch = batch_of(layout)
    for key in [key for key in batch if key.startswith("teacher_")]:
        with pytest.raises(
            ValueError,
            match=rf"batch must hold {key}, since the teacher of topd\.TRD reads another prompt, got no .* topd\.pair",
        ):
            topd.TRD(student, teacher)({name: value for name, value in batch.items() if name != key})
    with pytest.raises(TypeError, match="batch must be a mapping of tensors, got list"):
        topd.TRD(student, teacher)([batch])


def test_bad_constructions_are_refused():
    student, teacher = models()
    with pytest.raises(ValueError, match="teacher must be a model, which reads a prompt of its own, got None"):
        topd.TRD(student, None)
    for config in (topd.OPDConfig(), topd.OPSDConfig(), topd.TOPDConfig()):
        method = type(config).__name__.removesuffix("Config")
        message = rf"config must be a topd\.TRDConfig, got {method}Config; topd\.{method} takes that one"
        with pytest.raises(TypeError, match=message):
            topd.TRD(student, teacher, config)
    with pytest.raises(TypeError, match=r"config must be a topd\.OPDConfig, got TRDConfig; topd\.TRD takes that one"):
        topd.OPD(student, teacher, topd.TRDConfig())


def test_a_topk_of_the_batch_is_refused():
    student, teacher = models()
    with pytest.raises(ValueError, match=r"batch must hold no teacher_topk_ids where topd\.TRD has a teacher model"):
        topd.TRD(student, teacher)(batch_of() | {"teacher_topk_ids": torch.zeros(4, 14, 2)})


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (topd.OPDConfig, {"position_clip": 0}, ValueError, "position_clip must be finite and > 0, got 0; None means no clip"),
        (topd.OPDConfig, {"position_clip": "0.1"}, TypeError, "position_clip must be a number, got str"),
        (
            topd.OPDConfig,
            {"position_clip": 0.1, "hard_weight": 0.2},
            ValueError,
            "position_clip clips the divergence alone, got hard_weight=0.2 beside it",
        ),
        (topd.OPDConfig, {"top_k": 0}, ValueError, "top_k must be > 0, got 0; None for the whole vocabulary"),
        (topd.OPDConfig, {"top_k": 3.0}, TypeError, "top_k must be an int, got float"),
        (
            topd.OPDConfig,
            {"top_k": 3, "divergence": topd.ForwardKL(entry_clip=0.05)},
            ValueError,
            r'top_k takes "forward_kl" without an entry_clip, "reverse_kl" or "jsd", got the divergence ForwardKL\(entry_clip',
        ),
        (topd.OPDConfig, {"top_k": 3, "divergence": "skew_kl"}, ValueError, "top_k takes .* got the divergence SkewKL"),
        (topd.OPSDConfig, {"top_k": 3}, ValueError, "top_k takes"),
        (topd.TRDConfig, {"topk_support": "raw"}, ValueError, "topk_support is of topd.OPD with teacher=None, .* for topd.TRD"),
        (topd.OPSDConfig, {"topk_support": "raw"}, ValueError, "topk_support is of topd.OPD .* for topd.OPSD"),
        (topd.OPSDConfig, {"teacher": "frozen"}, ValueError, "teacher must be one of 'initial', 'live', 'ema', got 'frozen'"),
        (
            topd.OPSDConfig,
            {"teacher": "ema", "ema_decay": 1.0},
            ValueError,
            'ema_decay must be finite and >= 0 and < 1, got 1.0; for 1, which never moves, take "initial"',
        ),
        (
            topd.OPSDConfig,
            {"ema_decay": 0.9},
            ValueError,
            "ema_decay is of teacher=\"ema\", got 0.9 and teacher='initial'; leave one",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_at_creation(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**options)
