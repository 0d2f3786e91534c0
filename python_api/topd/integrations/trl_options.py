"""TRL's arguments and an objective's configuration: what they must agree on, and which method they name."""

from typing import Any

from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL, resolve_divergence
from topd.objectives.config import OPDConfig, OPSDConfig, TOPDConfig, TRDConfig
from topd.objectives.topk_teacher import direction_of


def check_config(config: Any) -> OPDConfig | None:
    """Check the type of an objective's configuration, and return it."""
    if config is not None and not isinstance(config, OPDConfig):
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise TypeError(
            f"objective_config must be a topd.OPDConfig, TOPDConfig, TRDConfig, OPSDConfig or None, got {got}; give a "
            "configuration, topd.OPDConfig(): the trainer makes the objective from it"
        )
    return config


def check_teacher(teacher_model: Any, teacher_topk: Any, config: OPDConfig | None) -> None:
    """Check that there is one teacher: a model, a top-k, or the student itself."""
    given = {"teacher_model": teacher_model, "teacher_topk": teacher_topk}
    if isinstance(config, OPSDConfig):
        for name, teacher in given.items():
            if teacher is not None:
                raise ValueError(
                    f"{name} must be left out where objective_config is a topd.OPSDConfig, got one; the student teaches itself"
                )
    elif teacher_model is None and teacher_topk is None:
        raise ValueError(
            "teacher_model must be a model or its name, got None; the objective compares with it; or give teacher_topk, which "
            "asks a server, or a topd.OPSDConfig, with which the student teaches itself"
        )
    elif teacher_model is not None and teacher_topk is not None:
        raise ValueError("teacher_model must be left out where teacher_topk is given, got both; the objective has one teacher")


def check_topk_config(config: OPDConfig) -> None:
    """Check that the configuration is one that a teacher's top-k can serve."""
    if isinstance(config, TOPDConfig | TRDConfig):
        needs = "continues a teacher model" if isinstance(config, TOPDConfig) else "gives a teacher model prompts of its own"
        raise ValueError(
            f"objective_config must be a topd.OPDConfig where teacher_topk is given, got a {type(config).__name__}, whose "
            f"method {needs}; take OPDConfig, or teacher_model"
        )
    direction_of(config)


def check_teacher_prompts(given: bool, config: OPDConfig, topk: bool) -> None:
    """Check that the dataset has teacher's prompts where the method demands them, and none where it cannot use them.

    Args:
        given: whether it has.
        topk: whether the teacher is known by its top-k alone.
    """
    kind = type(config).__name__
    if given and isinstance(config, TOPDConfig):
        raise ValueError(
            f"objective_config must be a topd.OPDConfig, TRDConfig or OPSDConfig where the dataset has teacher_prompt, got a "
            f"{kind}: TOPD's windows branch off one context, which student and teacher both read; take one of these, or remove "
            "the column"
        )
    if given and topk:
        raise ValueError(
            "the dataset must have no column teacher_prompt where teacher_topk is given, got one; the function that asks the "
            "teacher's server sees the student's rollouts alone: let it put a prompt of its own before their responses, and "
            "remove the column"
        )
    if not given and isinstance(config, TRDConfig | OPSDConfig):
        raise ValueError(
            f"the dataset must have a column teacher_prompt where objective_config is a topd.{kind}, got none; its teacher "
            "reads another prompt than the student: add it, text or messages, or give a data_collator that makes topd.pair's "
            "batches"
        )


def divergence_of(beta: float) -> Divergence:
    """Return the divergence that TRL's beta names."""
    if beta in (0.0, 1.0):
        return ReverseKL() if beta else ForwardKL()
    return JSD(beta)


def resolve_config(config: OPDConfig | None, beta: float, temperature: float, samples: bool = True) -> OPDConfig:
    """Return the objective's configuration beside TRL's arguments, which it may not contradict; `samples`: TRL samples the
    responses."""
    named = divergence_of(beta)
    if config is None:
        return TOPDConfig(divergence=named, temperature=temperature, window_temperature=temperature)
    own = resolve_divergence(config.divergence)
    if beta != 1.0 and own != named:
        raise ValueError(
            f"objective_config.divergence must be the one of args.beta = {beta}, {named}, got {own}; leave beta at its "
            "default, 1.0, to let the configuration choose"
        )
    if samples and config.temperature != temperature:
        raise ValueError(
            f"objective_config.temperature must be args.temperature, at which TRL samples, {temperature}, got "
            f"{config.temperature}; give both the same"
        )
    windows = config.window_temperature if isinstance(config, TOPDConfig) and config.window_noise == "counterfactual" else None
    if samples and windows not in (None, temperature):
        raise ValueError(
            "objective_config.window_temperature must be args.temperature, at which TRL samples, where window_noise is "
            f'"counterfactual", {temperature}, got {windows}; give both the same'
        )
    if config.reduction != "token":
        raise ValueError(
            f"objective_config.reduction must be 'token', since TRL counts tokens over a step, got {config.reduction!r}; for "
            "'sequence' take topd.integrations.transformers.DistillationTrainer"
        )
    return config
