"""TRL's DistillationTrainer with topd's objectives: its rollouts, arguments and logging, another `_compute_loss`.

TRL flattens a batch to its completion tokens; trajectories need their columns, so here it stays [B, T]. `_compute_loss` is
private to TRL: a version without it would train TRL's own loss, so it is looked for before and after.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import transformers
import trl
from torch import Tensor

from topd.integrations.objective_state import FollowSteps, load_resumed
from topd.integrations.processes import Processes, refuse_split_sequences
from topd.integrations.responses import first_responses, rows_of
from topd.integrations.running_means import SHARES, RunningTotals
from topd.integrations.tokenizers import check_tokenizers
from topd.integrations.trl_batches import (
    TEACHER_PROMPT,
    TeacherTopK,
    asked_topk,
    finished_rollouts,
    has_teacher_prompts,
    teacher_prompts_of,
    to_batch,
    tokenized,
)
from topd.integrations.trl_options import (
    check_config,
    check_teacher,
    check_teacher_prompts,
    check_topk_config,
    divergence_of,
    resolve_config,
)
from topd.models.inside import inside
from topd.models.sampling import left_padded
from topd.objectives.config import OPDConfig, OPSDConfig, TOPDConfig, TRDConfig
from topd.objectives.diagnostics import DIAGNOSTICS
from topd.objectives.opd import OPD
from topd.objectives.opsd import OPSD
from topd.objectives.topd import TOPD
from topd.objectives.trd import TRD

VERSIONS = "trl>=1.10,<1.17"
HOOK, HOOK_ARGUMENTS = "_compute_loss", ("unwrapped_student", "inputs", "num_items_in_batch")
BATCH_HOOK, BATCH_HOOK_ARGUMENTS = "_generate_and_score_completions", ("inputs",)
PURPOSES = {HOOK: "in whose place topd computes its loss", BATCH_HOOK: "to whose batch topd adds the teacher's prompts"}
METHODS: tuple[tuple[type[OPDConfig], Any], ...] = ((TOPDConfig, TOPD), (TRDConfig, TRD), (OPDConfig, OPD))


if not hasattr(trl, "DistillationTrainer"):
    raise ImportError(f"TRL must have DistillationTrainer, got TRL {trl.__version__} without it; install {VERSIONS!r}")


class TOPDTrainer(trl.DistillationTrainer):  # type: ignore[misc]
    """trl.DistillationTrainer whose loss is topd's.

    Args:
        arguments, options: TRL's own; `args` is a trl.DistillationConfig.
        objective_config: OPDConfig for OPD, TOPDConfig for TOPD, TRDConfig for TRD, OPSDConfig for OPSD, in which the student
            teaches itself and teacher_model is None. None: a TOPDConfig with the divergence that args.beta names
            and args.temperature for the loss and the windows. A given one must agree with args.temperature, at which TRL
            samples, and with args.beta where that is not TRL's default. None with teacher_topk: an OPDConfig of these two.
        teacher_topk: in place of a teacher_model, a function batch -> (logprobs, ids), called once for each micro-batch, that
            asks for the teacher's top-k of finished rollouts. The batch holds input_ids, attention_mask and response_mask, all
            [B, T]; the result, floating and int64 [B, T, k], speaks in column t of the token input_ids[:, t], at
            args.temperature. `topd.pad_topk` makes it from a server's answers.
        data_collator: None: TRL samples responses to the column prompt; where the dataset has a column teacher_prompt too, text
            or messages in each row, the teacher reads that instead, and the same response behind it. Or a function that makes
            finished rollouts of a list of rows, in most cases by `topd.pair`; they are taken as they are, TRL samples nothing.
        teacher_chat_template_kwargs: further words for the chat template of a teacher_prompt of messages; None:
            args.chat_template_kwargs, as for the student's.
        teacher_processing_class: the teacher's tokenizer or processor, to be compared with the student's. None: the tokenizer
            in the local folder that the teacher was loaded from, where there is one. TRL itself compares sizes alone.
        allow_unequal_vocabularies: do not compare tokenizers.

    Raises:
        TypeError, ValueError: TRL's own; an objective_config of another type, one that contradicts args or reduces by
            "sequence" (TRL counts tokens), a processor of images, a teacher with another tokenizer; no teacher_model and no
            teacher_topk, or both; a teacher_topk with a TOPDConfig or a divergence that a top-k does not determine; a column
            teacher_prompt with a TOPDConfig, whose windows branch off one context, or with teacher_topk, and none with a
            TRDConfig or OPSDConfig (at the first step where a dataset does not name its columns).
        ValueError: context or sequence parallelism; tensor parallelism with gradient accumulation.
        RuntimeError: this version of TRL computes its loss elsewhere; at construction, or at the first step.
    """

    def __init__(
        self,
        *arguments: Any,
        objective_config: OPDConfig | None = None,
        teacher_topk: TeacherTopK | None = None,
        data_collator: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
        teacher_chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_processing_class: Any = None,
        allow_unequal_vocabularies: bool = False,
        **options: Any,
    ) -> None:
        check_hook(trl.DistillationTrainer)
        check_hook(trl.DistillationTrainer, BATCH_HOOK, BATCH_HOOK_ARGUMENTS)
        check_config(objective_config)
        if teacher_topk is not None and not callable(teacher_topk):
            raise TypeError(f"teacher_topk must be a function batch -> (logprobs, ids), got {type(teacher_topk).__name__}")
        super().__init__(*arguments, **options)
        refuse_split_sequences(self)
        self._processes = Processes(self)
        if self._processes.same > 1:
            if self.args.gradient_accumulation_steps > 1:
                raise ValueError(
                    "args.gradient_accumulation_steps must be 1 with tensor parallelism, got "
                    f"{self.args.gradient_accumulation_steps}: TRL's sampler counts all processes, and would leave rows out; "
                    "take larger batches, or topd.integrations.transformers.DistillationTrainer"
                )
            # TRL has given each process a seed of its own, and these sample the same rollouts.
            transformers.set_seed(self.args.seed + self._processes.part)
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer, got a processor; topd's objectives read text alone")
        check_teacher(self.teacher_model, teacher_topk, objective_config)
        self.teacher_topk = teacher_topk
        if teacher_topk is not None and objective_config is None:
            objective_config = OPDConfig(divergence=divergence_of(self.args.beta), temperature=self.args.temperature)
        samples = data_collator is None
        self.objective_config = resolve_config(objective_config, self.args.beta, self.args.temperature, samples)
        if teacher_topk is not None:
            check_topk_config(self.objective_config)
        if self.teacher_model is not None and not allow_unequal_vocabularies:
            check_tokenizers(self.processing_class, teacher_processing_class, self.accelerator.unwrap_model(self.teacher_model))
        if data_collator is not None:
            if self.args.remove_unused_columns:
                raise ValueError(
                    "args.remove_unused_columns must be False where data_collator is given, got True; it reads them"
                )
            self.data_collator = data_collator
        else:
            self._check_columns()
        given = teacher_chat_template_kwargs
        self.teacher_chat_template_kwargs = dict((self.args.chat_template_kwargs or {}) if given is None else given)
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._totals = {"train": RunningTotals(), "eval": RunningTotals()}
        self._objective: OPD | TOPD | None = None
        if isinstance(self.objective_config, OPSDConfig):  # whose teacher may be the student as it is now
            self._objective_for(self.accelerator.unwrap_model(self.model), None)
        elif getattr(self.objective_config, "gate", None) == "running_quantile":  # whose memory a checkpoint gives back
            self._objective_for(self.accelerator.unwrap_model(self.model), self.teacher_model)
        self.add_callback(FollowSteps(self, lambda: self._objective))

    def _check_columns(self) -> None:
        """Check that the datasets have a column teacher_prompt where the method demands it, and none where it cannot use it; a
        dataset that does not name its columns is checked at the first step."""
        evaluated = self.eval_dataset
        for dataset in (self.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
            given = has_teacher_prompts(dataset)
            if given is not None:
                check_teacher_prompts(given, self.objective_config, self.teacher_topk is not None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train as TRL does; where a checkpoint is resumed, the objective goes on from it too."""
        load_resumed(self._objective, self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *arguments, **options)

    @property
    def objective(self) -> OPD | TOPD:
        """Return the objective whose loss is trained, as `topd.profile` takes it."""
        teacher = None if isinstance(self.objective_config, OPSDConfig) else self.teacher_model
        return self._objective_for(self.accelerator.unwrap_model(self.model), teacher)

    def _objective_for(self, student: Any, teacher: Any) -> OPD | TOPD:
        """Return the objective of these models, the same one for as long as they and the configuration are the same."""
        config, last = self.objective_config, self._objective
        same = last is not None and last.student is student and last.config is config
        if last is not None and same and (isinstance(last, OPSD) or last.teacher is teacher):
            return last
        if isinstance(config, OPSDConfig):
            self._objective = OPSD(student, config)
            return self._objective
        method = next(method for kind, method in METHODS if isinstance(config, kind))
        given: dict[str, Any] = {"allow_unequal_vocabularies": self.allow_unequal_vocabularies}
        if method is TOPD:
            given["process_group"] = self._processes.group()
        self._objective = method(student, teacher, config, **given)
        return self._objective

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TEACHER_PROMPT not in self._signature_columns:
            self._signature_columns.append(TEACHER_PROMPT)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Return TRL's batch of prompts and completions with the teacher's prompts beside them; or finished rollouts."""
        if isinstance(inputs, Mapping):  # data_collator's; TRL's own passes a list of rows
            batch = finished_rollouts(inputs, self.accelerator.device)
            count = self.accelerator.gather((batch["response_mask"] != 0).sum()).sum()
            return {**batch, "num_items_in_batch": count}
        prompts = teacher_prompts_of(inputs)
        check_teacher_prompts(prompts is not None, self.objective_config, self.teacher_topk is not None)
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if prompts is not None:
            template = {"tools": getattr(self, "tools", None) or None, "chat_template": getattr(self, "chat_template", None)}
            rows = tokenized(self.processing_class, prompts, **template, **self.teacher_chat_template_kwargs)
            padding, multiple = self.processing_class.pad_token_id, self.args.pad_to_multiple_of
            ids, mask = left_padded(rows, padding, self.accelerator.device, multiple)
            output |= {"teacher_prompt_ids": ids, "teacher_prompt_mask": mask}
        return output

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies, and how many completion tokens they are over."""
        batch, teacher = to_batch(inputs), None
        mode, rows = "train" if self.model.training else "eval", rows_of(batch)
        kept = rows if mode == "train" else self._processes.new_rows(rows)
        batch = batch if kept == rows else first_responses(batch, kept)
        if self.teacher_topk is not None:
            batch |= asked_topk(self.teacher_topk, batch)
        elif self.teacher_model is not None:
            self.teacher_model.eval()
            teacher = self.teacher_model  # the objective runs inside its wrapper
        objective = self._objective_for(unwrapped_student, teacher)
        # TRL calls this inside the student's wrapper, which may leave the output layer sharded.
        result = inside(unwrapped_student, lambda given: objective(given, num_items=num_items_in_batch), batch)
        parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        self._totals[mode].add(result.totals)
        history = self._metrics[mode]
        for name, value in as_numbers(result.metrics, parts).items():
            history[name].append(value)
        self._loss_was_topds = True
        return result.loss, result.scores.student_entropy.sum(), batch["response_mask"].sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does; the diagnostics are those of all tokens since the last line, of all processes."""
        mode = "train" if self.model.training else "eval"
        diagnostics = self._totals[mode].take(self._processes.gather)
        self._metrics[mode] |= {name: [value] for name, value in diagnostics.items()}
        super().log(logs, start_time)

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


def check_hook(base: type, hook: str = HOOK, arguments: tuple[str, ...] = HOOK_ARGUMENTS) -> None:
    """Check that TRL's trainer has a method that topd's overrides, with the same arguments.

    Raises:
        RuntimeError: it has not: TRL would train its own loss.
    """
    method = inspect.getattr_static(base, hook, None)
    came = tuple(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else None
    if came != arguments:
        text = "no such method" if came is None else f"{hook}({', '.join(came)})"
        raise RuntimeError(
            f"trl.DistillationTrainer must have {hook}({', '.join(arguments)}), {PURPOSES[hook]}, got {text} in TRL "
            f"{trl.__version__}; install {VERSIONS!r}"
        )


def as_numbers(metrics: Mapping[str, Tensor], parts: int) -> dict[str, float]:
    """Return the metrics whose means TRL logs: without the loss, which it logs itself, without the diagnostics, which are no
    means, and without those that measured nothing (NaN).

    Args:
        metrics: an objective's.
        parts: of how many micro-batches the step consists whose shares these are; TRL takes their mean.
    """
    own = {name: value for name, value in metrics.items() if name != "loss" and name not in DIAGNOSTICS}
    values = {name: value.item() * (parts if name in SHARES else 1) for name, value in own.items()}
    return {name: value for name, value in values.items() if name in SHARES or not math.isnan(value)}
