"""Divergences as mappings of a name and parameters, and configs that come back from dataclasses.asdict, JSON and YAML."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

import topd

DIVERGENCES = [
    topd.ForwardKL(),
    topd.ForwardKL(entry_clip=0.05),
    topd.ReverseKL(),
    topd.JSD(0.3),
    topd.SkewKL(0.2),
    topd.SkewReverseKL(0.4),
    topd.TotalVariation(),
]
LITERAL = [
    ({"name": "jsd", "beta": 0.3}, topd.JSD(0.3)),
    ({"name": "jsd"}, topd.JSD(0.5)),
    ({"name": "forward_kl", "entry_clip": None}, topd.ForwardKL()),
    ({"entry_clip": 0.05, "name": "forward_kl"}, topd.ForwardKL(0.05)),
    ({"name": "reverse_kl"}, topd.ReverseKL()),
]


def through_yaml(value):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(yaml.safe_dump(value))


WAYS = {"asdict": lambda value: value, "json": lambda value: json.loads(json.dumps(value)), "yaml": through_yaml}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [topd.OPDConfig, topd.TOPDConfig])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "jsd", "reverse_kl"], ids=str)
def test_every_config_comes_back(divergence, kind, way):
    config = kind(divergence=divergence, temperature=0.7, reduction="sequence", hard_weight=0.1)
    again = kind(**WAYS[way](dataclasses.asdict(config)))
    assert again == config
    assert hash(again) == hash(config)
    assert again.divergence == divergence


@pytest.mark.parametrize("way", WAYS)
def test_every_option_of_topd_comes_back(way):
    options = {"score": "gap", "false_alarms": "mask", "gate": "threshold", "gate_value": 0.4, "embedding": "student_hidden"}
    config = topd.TOPDConfig(topd.JSD(0.2), candidates="top_k", candidate_value=3, solver="exact", **options)
    assert topd.TOPDConfig(**WAYS[way](dataclasses.asdict(config))) == config


@pytest.mark.parametrize(("mapping", "divergence"), LITERAL, ids=str)
def test_a_mapping_is_its_divergence(mapping, divergence):
    config = topd.OPDConfig(divergence=mapping)
    assert config.divergence == divergence
    assert config == topd.OPDConfig(divergence=divergence)
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    sides = (hidden, topd.Head(weight), torch.randn(3, 4), topd.Head(torch.randn(7, 4)))
    by_mapping = topd.linear_divergence(*sides, divergence=mapping)
    assert torch.equal(by_mapping, topd.linear_divergence(*sides, divergence=divergence))


def test_a_divergence_names_itself():
    assert dataclasses.asdict(topd.JSD(0.3)) == {"name": "jsd", "beta": 0.3}
    assert dataclasses.asdict(topd.ReverseKL()) == {"name": "reverse_kl"}
    assert [repr(each) for each in (topd.JSD(0.3), topd.ReverseKL())] == ["JSD(beta=0.3)", "ReverseKL()"]
    assert topd.JSD.name == "jsd"
    assert dataclasses.replace(topd.JSD(0.3), beta=0.4) == topd.JSD(beta=0.4)
    assert topd.SkewKL(0.3) != topd.SkewReverseKL(0.3)
    assert len({topd.JSD(0.3), topd.JSD(0.3), topd.JSD(0.4)}) == 2
    for each in DIVERGENCES:
        assert pickle.loads(pickle.dumps(each)) == copy.deepcopy(each) == each
    with pytest.raises(TypeError, match="name"):
        topd.JSD(0.3, name="reverse_kl")
    with pytest.raises(dataclasses.FrozenInstanceError):
        topd.JSD(0.3).name = "kl"


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"name": "jsd", "alpha": 0.3}, ValueError, "divergence 'jsd' takes beta, got the unknown key 'alpha'"),
        (
            {"name": "reverse_kl", "beta": 1},
            ValueError,
            "divergence 'reverse_kl' takes no parameter, got the unknown key 'beta'",
        ),
        ({"beta": 0.3}, ValueError, 'divergence must have its "name" where it is a mapping'),
        ({"name": "kl"}, ValueError, "divergence must be one of 'forward_kl'"),
        ({"name": topd.JSD(0.3)}, ValueError, 'divergence must have its "name"'),
        ({"name": "jsd", "beta": 1.0}, ValueError, "beta must be finite and > 0 and < 1, got 1.0"),
        ({"name": "jsd", "beta": "0.3"}, TypeError, "beta must be a number, got str"),
        ({1: 2, "name": "jsd"}, ValueError, "got the unknown key 1"),
        ({}, ValueError, 'divergence must have its "name"'),
        (["jsd"], TypeError, "divergence must be a name, .* or a mapping .* got list"),
    ],
    ids=str,
)
def test_bad_mappings_are_refused_at_creation(mapping, error, message):
    with pytest.raises(error, match=message):
        topd.OPDConfig(divergence=mapping)
