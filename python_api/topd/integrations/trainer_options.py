"""What `DistillationTrainer` takes: its own options, and those of Trainer that it refuses."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from topd.checks.values import real
from topd.integrations.rollouts import sample_rollouts

Rollout = Mapping[str, Any] | Callable[[Any, Mapping[str, Any]], Mapping[str, Tensor]]
ROLLOUT_OPTIONS = {
    name for name, each in inspect.signature(sample_rollouts).parameters.items() if each.kind is each.KEYWORD_ONLY
}


def check_rollout(rollout: Any) -> Rollout | None:
    """Check how batches of prompts are continued, and return it."""
    if rollout is None or callable(rollout):
        return rollout  # type: ignore[no-any-return]
    if not isinstance(rollout, Mapping):
        raise TypeError(f"rollout must be options of sample_rollouts, a function or None, got {type(rollout).__name__}")
    if "max_new_tokens" not in rollout or set(rollout) - ROLLOUT_OPTIONS:
        raise ValueError(f"rollout must hold max_new_tokens and may hold {sorted(ROLLOUT_OPTIONS)}, got {sorted(rollout)}")
    return dict(rollout)


def check_options(args: Any, options: Mapping[str, Any]) -> None:
    """Refuse what Trainer could do and this trainer cannot."""
    refused = (
        (options.get("model") is not None, "model", "the objective's student is the model"),
        (options.get("model_init") is not None, "model_init", "the objective holds the student"),
        (options.get("compute_loss_func") is not None, "compute_loss_func", "the objective is the loss"),
        (options.get("compute_metrics") is not None, "compute_metrics", "an evaluation returns losses and metrics, no logits"),
        (bool(args.label_smoothing_factor), "args.label_smoothing_factor", "there are no labels"),
        (bool(args.torch_compile), "args.torch_compile", "compile the student's layers instead"),
        (bool(args.use_liger_kernel), "args.use_liger_kernel", "the loss is topd's own"),
    )
    for met, name, reason in refused:
        if met:
            raise ValueError(f"{name} must be left out, got one; {reason}")


def check_lmbda(lmbda: Any, rollout: Any) -> float | None:
    """Check the share of micro-batches whose responses are sampled anew, and return it."""
    if lmbda is None:
        return None
    share = real("lmbda", lmbda, low=0.0, high=1.0, hint="None to take batches as they come")
    if share > 0 and rollout is None:
        raise ValueError(
            f"rollout must be given where lmbda is above 0, got lmbda={share} and no rollout; give it, for instance "
            "{'max_new_tokens': 64}"
        )
    return share
