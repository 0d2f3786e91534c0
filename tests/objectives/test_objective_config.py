"""OPDConfig and TOPDConfig: the contract's defaults, and every wrong option refused when the config is made."""

import dataclasses

import pytest
import torch

import topd

DEFAULTS = {
    "divergence": "reverse_kl",
    "temperature": 1.0,
    "reduction": "token",
    "hard_weight": 0.0,
    "topk_support": "tail",
    "position_clip": None,
    "top_k": None,
    "epistemic_ids": None,
    "teacher_top2": False,
    "score": "teacher_nll",
    "candidates": "top_fraction",
    "candidate_value": 0.0225,
    "min_separation": 0,
    "horizon": 50,
    "student_window": "regenerate",
    "window_temperature": 1.0,
    "cost": "cosine",
    "embedding": "student",
    "solver": "sinkhorn",
    "epsilon": 0.05,
    "gate": "lowest_fraction_out",
    "gate_value": None,
    "guidance_weight": 0.1,
    "false_alarms": "keep",
    "eos_token_id": None,
    "window_noise": "independent",
    "guidance_reduction": "points",
}


def test_the_defaults_are_the_contracts():
    assert dataclasses.asdict(topd.TOPDConfig()) == DEFAULTS
    assert dataclasses.asdict(topd.OPDConfig()) == dict(list(DEFAULTS.items())[:9])
    with pytest.raises(dataclasses.FrozenInstanceError):
        topd.TOPDConfig().horizon = 3


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": topd.JSD(0.2), "temperature": 2},
        {"candidates": "top_k", "candidate_value": 5},
        {"candidates": "quantile", "candidate_value": 0},
        {"candidates": "threshold", "candidate_value": -3.5},
        {"horizon": 128, "window_temperature": 0},
        {"embedding": torch.zeros(4, 2)},
        {"embedding": "student_hidden"},
        {"gate": "threshold", "gate_value": 0.4},
        {"gate": "mean_plus_std", "gate_value": -1},
        {"score": "gap", "false_alarms": "mask"},
        {"score": "gap", "false_alarms": "cap"},
        {"eos_token_id": 3},
        {"eos_token_id": [3, 4]},
        {"eos_token_id": []},
        {"window_noise": "shared", "window_temperature": 0.7},
        {"window_noise": "counterfactual", "student_window": "rollout"},
        {"score": "reverse_kl", "false_alarms": "cap", "guidance_weight": 0},
    ],
    ids=str,
)
def test_good_options_are_taken(options):
    config = topd.TOPDConfig(**options)
    assert all(getattr(config, name) is value for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence must be one of"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'token', 'sequence', got 'sum'"),
        ({"hard_weight": -0.1}, ValueError, "hard_weight must be finite and >= 0, got -0.1"),
        ({"score": "nll"}, ValueError, "score must be one of 'teacher_nll', 'reverse_kl', 'student_nll', 'gap'"),
        ({"candidates": "top"}, ValueError, "candidates must be one of"),
        ({"candidate_value": 0.0}, ValueError, "candidate_value must be finite and > 0 and <= 1"),
        ({"candidates": "top_k"}, TypeError, "candidate_value must be an int, got float; candidates='top_k' takes a count"),
        ({"candidates": "quantile", "candidate_value": 1.5}, ValueError, "candidate_value must be finite and >= 0 and <= 1"),
        ({"candidates": "threshold", "candidate_value": "3"}, TypeError, "candidate_value must be a number, got str"),
        ({"min_separation": -1}, ValueError, "min_separation must be > 0, got -1; or 0, for none"),
        ({"horizon": 0}, ValueError, "horizon must be > 0, got 0"),
        ({"horizon": 129}, ValueError, "horizon must be at most 128"),
        ({"student_window": "replay"}, ValueError, "student_window must be one of 'regenerate', 'rollout'"),
        ({"window_temperature": -1}, ValueError, "window_temperature must be finite and >= 0, got -1; 0 is greedy"),
        ({"window_noise": "same"}, ValueError, "window_noise must be one of 'independent', 'shared', 'counterfactual', got"),
        (
            {"window_noise": "counterfactual"},
            ValueError,
            'student_window="regenerate"; take student_window="rollout", or window_n',
        ),
        ({"window_noise": "shared", "student_window": "rollout"}, ValueError, 'or window_noise="counterfactual"'),
        (
            {"window_noise": "shared", "window_temperature": 0},
            ValueError,
            "needs window_temperature > 0, got 0, which is greedy",
        ),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an int, a list of ints or None, got '</s>'"),
        ({"eos_token_id": [2, -1]}, ValueError, "eos_token_id must be >= 0 and an id, got -1"),
        ({"cost": "l2"}, ValueError, "cost must be one of"),
        ({"solver": "emd"}, ValueError, "solver must be one of 'sinkhorn', 'exact'"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be finite and > 0"),
        ({"embedding": "mine"}, ValueError, "embedding must be one of 'student', 'teacher', 'student_hidden'"),
        ({"embedding": torch.zeros(3)}, ValueError, r"embedding must be a table \[V, d\], got \[3\]"),
        ({"embedding": 3}, TypeError, "embedding must be a name or a tensor"),
        ({"embedding": "student_hidden", "cost": "mismatch"}, ValueError, 'cost "mismatch" compares tokens'),
        ({"gate": "all"}, ValueError, "gate must be one of"),
        ({"gate": "threshold"}, TypeError, "gate_value must be a number, got NoneType; gate='threshold' takes a finite number"),
        ({"gate_value": 1.5}, ValueError, "gate_value must be finite and >= 0 and <= 1"),
        ({"guidance_weight": -0.1}, ValueError, "guidance_weight must be finite and >= 0"),
        ({"guidance_reduction": "sum"}, ValueError, "guidance_reduction must be one of 'points', 'tokens', got 'sum'"),
        ({"false_alarms": "drop"}, ValueError, "false_alarms must be one of 'keep', 'cap', 'mask', got 'drop'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_at_creation(options, error, message):
    with pytest.raises(error, match=message):
        topd.TOPDConfig(**options)
