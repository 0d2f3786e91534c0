"""TRL's DistillationTrainer with topd's objectives: its rollouts, arguments and logging, another `_compute_loss`.

TRL flattens a batch to its completion tokens; trajectories need their columns, so here it stays [B, T]. `_compute_loss` is
private to TRL: a version without it would train TRL's own loss, so it is looked for before and after.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
from torch import Tensor

from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL, resolve_divergence
from topd.integrations.objective_state import FollowSteps, load_resumed
from topd.integrations.running_means import SHARES
from topd.integrations.tokenizers import check_tokenizers
from topd.objectives.config import OPDConfig, TOPDConfig
from topd.objectives.opd import OPD
from topd.objectives.topd import TOPD
from topd.objectives.topk_teacher import TOPK_KEYS, direction_of

TeacherTopK = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
VERSIONS = "trl>=1.10,<1.17"
HOOK, HOOK_ARGUMENTS = "_compute_loss", ("unwrapped_student", "inputs", "num_items_in_batch")
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


if not hasattr(trl, "DistillationTrainer"):
    raise ImportError(f"TRL must have DistillationTrainer, got TRL {trl.__version__} without it; install {VERSIONS!r}")


class TOPDTrainer(trl.DistillationTrainer):  # type: ignore[misc]
    """trl.DistillationTrainer whose loss is topd's.

    Args:
        arguments, options: TRL's own; `args` is a trl.DistillationConfig.
        objective_config: OPDConfig for OPD, TOPDConfig for TOPD. None: a TOPDConfig with the divergence that args.beta names
            and args.temperature for the loss and the windows. A given one must agree with args.temperature, at which TRL
            samples, and with args.beta where that is not TRL's default. None with teacher_topk: an OPDConfig of these two.
        teacher_topk: in place of a teacher_model, a function batch -> (logprobs, ids), called once for each micro-batch, that
            asks for the teacher's top-k of finished rollouts. The batch holds input_ids, attention_mask and response_mask, all
            [B, T]; the result, floating and int64 [B, T, k], speaks in column t of the token input_ids[:, t], at
            args.temperature. `topd.pad_topk` makes it from a server's answers.
        teacher_processing_class: the teacher's tokenizer or processor, to be compared with the student's. None: the tokenizer
            in the local folder that the teacher was loaded from, where there is one. TRL itself compares sizes alone.
        allow_unequal_vocabularies: do not compare tokenizers.

    Raises:
        TypeError, ValueError: TRL's own; an objective_config of another type, one that contradicts args or reduces by
            "sequence" (TRL counts tokens), a processor of images, a teacher with another tokenizer; no teacher_model and no
            teacher_topk, or both; a teacher_topk with a TOPDConfig or a divergence that a top-k does not determine.
        RuntimeError: this version of TRL computes its loss elsewhere; at construction, or at the first step.
    """

    def __init__(
        self,
        *arguments: Any,
        objective_config: OPDConfig | None = None,
        teacher_topk: TeacherTopK | None = None,
        teacher_processing_class: Any = None,
        allow_unequal_vocabularies: bool = False,
        **options: Any,
    ) -> None:
        check_hook(trl.DistillationTrainer)
        if objective_config is not None and not isinstance(objective_config, OPDConfig):
            came = type(objective_config).__name__
            raise TypeError(f"objective_config must be a topd.OPDConfig, a topd.TOPDConfig or None, got {came}")
        if teacher_topk is not None and not callable(teacher_topk):
            raise TypeError(f"teacher_topk must be a function batch -> (logprobs, ids), got {type(teacher_topk).__name__}")
        super().__init__(*arguments, **options)
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer, got a processor; topd's objectives read text alone")
        if self.teacher_model is None and teacher_topk is None:
            raise ValueError(
                "teacher_model must be a model or its name, got None; the objective compares with it; or give teacher_topk, "
                "which asks a server"
            )
        if self.teacher_model is not None and teacher_topk is not None:
            raise ValueError(
                "teacher_model must be left out where teacher_topk is given, got both; the objective has one teacher"
            )
        self.teacher_topk = teacher_topk
        if teacher_topk is not None and objective_config is None:
            objective_config = OPDConfig(divergence=divergence_of(self.args.beta), temperature=self.args.temperature)
        self.objective_config = resolve_config(objective_config, self.args.beta, self.args.temperature)
        if teacher_topk is not None:
            _check_topk_config(self.objective_config)
        if self.teacher_model is not None and not allow_unequal_vocabularies:
            check_tokenizers(self.processing_class, teacher_processing_class, self.accelerator.unwrap_model(self.teacher_model))
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._objective: OPD | TOPD | None = None
        self.add_callback(FollowSteps(self, lambda: self._objective))

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train as TRL does; where a checkpoint is resumed, the objective goes on from it too."""
        load_resumed(self._objective, self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *arguments, **options)

    def _objective_for(self, student: Any, teacher: Any) -> OPD | TOPD:
        """Return the objective of these models, the same one for as long as they and the configuration are the same."""
        config, last = self.objective_config, self._objective
        if last is not None and last.student is student and last.teacher is teacher and last.config is config:
            return last
        method = TOPD if isinstance(config, TOPDConfig) else OPD
        unequal = self.allow_unequal_vocabularies
        self._objective = method(student, teacher, config, allow_unequal_vocabularies=unequal)  # type: ignore[arg-type]
        return self._objective

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies, and how many completion tokens they are over."""
        batch, teacher = to_batch(inputs), None
        if self.teacher_topk is not None:
            batch |= asked_topk(self.teacher_topk, batch)
        else:
            self.teacher_model.eval()
            teacher = self.accelerator.unwrap_model(self.teacher_model)
        result = self._objective_for(unwrapped_student, teacher)(batch, num_items=num_items_in_batch)
        parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        history = self._metrics["train" if self.model.training else "eval"]
        for name, value in as_numbers(result.metrics, parts).items():
            history[name].append(value)
        self._loss_was_topds = True
        return result.loss, result.scores.student_entropy.sum(), batch["response_mask"].sum()

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Take TRL's step, and make sure that its loss was topd's."""
        return self._with_topds_loss(super().training_step, *arguments, **options)

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        """Take TRL's evaluation step, and make sure that its loss was topd's."""
        return self._with_topds_loss(super().prediction_step, *arguments, **options)

    def _with_topds_loss(self, step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Take a step; raise where it did not come to `_compute_loss`."""
        self._loss_was_topds = False
        output = step(*arguments, **options)
        if not self._loss_was_topds:
            raise RuntimeError(
                f"trl.DistillationTrainer must compute its loss by {HOOK}, got a step without it from TRL {trl.__version__}; "
                f"install {VERSIONS!r}"
            )
        return output


def check_hook(base: type) -> None:
    """Check that TRL's trainer has the method that topd's overrides, with the same arguments.

    Raises:
        RuntimeError: it has not: TRL would train its own loss.
    """
    method = inspect.getattr_static(base, HOOK, None)
    came = tuple(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else None
    if came != HOOK_ARGUMENTS:
        text = "no such method" if came is None else f"{HOOK}({', '.join(came)})"
        raise RuntimeError(
            f"trl.DistillationTrainer must have {HOOK}({', '.join(HOOK_ARGUMENTS)}), in whose place topd computes its loss, "
            f"got {text} in TRL {trl.__version__}; install {VERSIONS!r}"
        )


def as_numbers(metrics: Mapping[str, Tensor], parts: int) -> dict[str, float]:
    """Return the metrics that TRL logs: without the loss, which it logs itself, and without those that measured nothing (NaN).

    Args:
        metrics: an objective's.
        parts: of how many micro-batches the step consists whose shares these are; TRL takes their mean.
    """
    values = {name: value.item() * (parts if name in SHARES else 1) for name, value in metrics.items() if name != "loss"}
    return {name: value for name, value in values.items() if name in SHARES or not math.isnan(value)}


def to_batch(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn TRL's prompts and completions into the batch of an objective; what tools wrote is attended but no response."""
    images = [key for key in MULTIMODAL if inputs.get(key) is not None]
    if images:
        raise ValueError(f"inputs must be text alone, got {images[0]}; topd's objectives read no images")
    response = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "response_mask": torch.cat([torch.zeros_like(inputs["prompt_mask"]), response], dim=1),
    }


def asked_topk(teacher_topk: TeacherTopK, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ask the user's function for the batch keys of a top-k teacher, on the batch's device; OPD checks the tensors."""
    answer = teacher_topk(dict(batch))
    if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(each, Tensor) for each in answer):
        raise TypeError(
            f"teacher_topk must return (logprobs, ids), two tensors, got {type(answer).__name__}; topd.pad_topk makes them "
            "from a server's answers"
        )
    return {key: value.to(batch["input_ids"].device) for key, value in zip(TOPK_KEYS, answer, strict=True)}


def _check_topk_config(config: OPDConfig) -> None:
    """Check that the configuration is one that a teacher's top-k can serve."""
    if isinstance(config, TOPDConfig):
        raise ValueError(
            "objective_config must be a topd.OPDConfig where teacher_topk is given, got a TOPDConfig, whose method continues a "
            "teacher model; take OPDConfig, or teacher_model"
        )
    direction_of(config)


def divergence_of(beta: float) -> Divergence:
    """Return the divergence that TRL's beta names."""
    if beta in (0.0, 1.0):
        return ReverseKL() if beta else ForwardKL()
    return JSD(beta)


def resolve_config(config: OPDConfig | None, beta: float, temperature: float) -> OPDConfig:
    """Return the objective's configuration beside TRL's arguments, which it may not contradict."""
    named = divergence_of(beta)
    if config is None:
        return TOPDConfig(divergence=named, temperature=temperature, window_temperature=temperature)
    own = resolve_divergence(config.divergence)
    if beta != 1.0 and own != named:
        raise ValueError(
            f"objective_config.divergence must be the one of args.beta = {beta}, {named}, got {own}; leave beta at its "
            "default, 1.0, to let the configuration choose"
        )
    if config.temperature != temperature:
        raise ValueError(
            f"objective_config.temperature must be args.temperature, at which TRL samples, {temperature}, got "
            f"{config.temperature}; give both the same"
        )
    if config.reduction != "token":
        raise ValueError(
            f"objective_config.reduction must be 'token', since TRL counts tokens over a step, got {config.reduction!r}; for "
            "'sequence' take topd.integrations.transformers.DistillationTrainer"
        )
    return config
