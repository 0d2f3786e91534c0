"""Diagnostics in float64, token by token, from both models' whole distributions."""

import math

import torch
from pair_cases import loss_of
from torch import Tensor

import topd
from topd.objectives.diagnostics import DIAGNOSTICS

EPISTEMIC = (3, 17, 40)


def diagnostics_of(log: dict, prefix: str = "") -> dict[str, float]:
    """Return what a trainer has logged of the diagnostics."""
    return {name: log[prefix + name] for name in DIAGNOSTICS if prefix + name in log}


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Return the diagnostics among metrics that measured something."""
    values = {name: metrics[name].item() for name in DIAGNOSTICS if name in metrics}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def percentile(values: Tensor, share: float) -> float:
    """Return the least of the values [N] that at least this share of them does not exceed."""
    return values.sort().values[math.ceil(share * values.numel()) - 1].item()


def truth(sides: list[tuple[Tensor, Tensor, Tensor, Tensor]], verdict: list[bool], config: topd.OPDConfig) -> dict[str, float]:
    """Return the diagnostics of rows.

    Args:
        sides: of each row log p_S and log p_T [n, V] of its response tokens, these tokens [n], and the columns [n] where they
            stand.
    """
    per_token = loss_of(topd.OPDConfig(config.divergence, top_k=config.top_k))
    divergence, own, other, mass, bimodal, fragmented = ([] for _ in range(6))
    for student, teacher, tokens, columns in sides:
        divergence.append(per_token(student, teacher))
        first = teacher.argmax(-1)
        for t, token in enumerate(tokens.tolist()):
            own.append(student[t, token])
            other.append(teacher[t, token])
            probabilities = teacher[t].exp()
            mass.append(probabilities[list(config.epistemic_ids)].sum())
            others = torch.cat([probabilities[:token], probabilities[token + 1 :]])
            bimodal.append(bool(probabilities[token] >= 0.25 and others.max() >= 0.25))
            follows = t + 1 < len(tokens) and columns[t + 1] == columns[t] + 1
            fragmented.append(bool(follows and first[t] == first[t + 1] and first[t] != token and first[t] != tokens[t + 1]))
    counts = [each.numel() for each in divergence]
    correct = torch.tensor([right for right, count in zip(verdict, counts, strict=True) for _ in range(count)])
    values = torch.cat(divergence)
    perplexities = [torch.stack(each).mean().neg().exp().item() for each in (own, other)]
    return {
        "kl_mean": values.mean().item(),
        "clip_share": (values > config.position_clip).double().mean().item(),
        "kl_correct": values[correct].mean().item(),
        "kl_incorrect": values[~correct].mean().item(),
        "tokens_correct": correct.sum().item(),
        "tokens_incorrect": (~correct).sum().item(),
        "epistemic_mass": torch.stack(mass).mean().item(),
        "bimodal_share": sum(bimodal) / len(bimodal),
        "fragmented_share": sum(fragmented) / len(fragmented),
        **{f"kl_p{number}": percentile(values, number / 100) for number in (50, 95, 99)},
        "kl_max": values.max().item(),
        "student_perplexity": perplexities[0],
        "teacher_perplexity": perplexities[1],
        "perplexity_gap": perplexities[0] - perplexities[1],
    }


def assert_diagnostics(values: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    """Check the diagnostics; a percentile may be 1 % off, which is its histogram's resolution."""
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        allowed = 0.0101 if name.startswith("kl_p") else tolerance
        assert abs(values[name] - value) <= allowed * max(abs(value), 1e-8), name
