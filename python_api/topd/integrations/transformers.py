"""transformers.Trainer for an objective: samples the rollouts of an optimizer step, counts what they hold, takes the loss.

The denominator of a step is known only once all of its micro-batches have their rollouts. So they are sampled where Trainer
fetches a step's micro-batches (`get_batch_samples`), and the count is what Trainer hands to each loss as num_items_in_batch.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import transformers
from torch import Tensor

from topd.checks.values import check_tensor
from topd.integrations.objective_state import FollowSteps, load_resumed
from topd.integrations.processes import Processes, refuse_split_sequences
from topd.integrations.responses import first_responses, repeated, rows_of, without_responses
from topd.integrations.rollouts import sample_rollouts, with_teacher_prompts
from topd.integrations.running_means import RunningMeans, RunningTotals
from topd.integrations.tokenizers import check_tokenizers
from topd.integrations.trainer_options import Rollout, check_lmbda, check_options, check_rollout
from topd.models.inside import inside
from topd.models.properties import vocabulary_of
from topd.objectives.opd import OPD
from topd.objectives.topd import TOPD


class DistillationTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers.Trainer that trains an objective's student on its own rollouts.

    Args:
        objective: topd.OPD, TRD, OPSD or TOPD. Its student is trained; its teacher is put in eval mode and on the student's
            device. A topd.OPD without a teacher model wants the teacher's top-k in its batches, of the data or of `rollout`.
        args: transformers.TrainingArguments; no column is removed, whatever remove_unused_columns says.
        data_collator: makes batches of prompts, input_ids and attention_mask [B, P] padded on the left; or of finished
            rollouts, which have a response_mask too, for instance those of `topd.pair`. Prompts may have the teacher's own
            beside them, teacher_input_ids and teacher_attention_mask [B, P'] padded on the left: the sampled response goes
            behind both.
        rollout: how batches without a response_mask are continued: options of `sample_rollouts`, at least max_new_tokens
            (vocabulary is the teacher's size, where that is smaller; with samples_per_prompt the batch's other tensors and
            lists are repeated); or a function (student, batch) -> the batch that the objective gets, for instance a
            `RefineRollout`. None: batches come with their rollouts.
        lmbda: in [0, 1], as in TRL's GKD: batches come with their rollouts, and in training each micro-batch's responses are
            left out and sampled anew, by `rollout`, with this probability. All processes decide alike, by args.seed and the
            step, also after a checkpoint. An evaluation takes the data's responses. None: a batch with responses is taken as
            it is.
        teacher_processing_class: the teacher's tokenizer or processor, to be compared with processing_class. None: the
            tokenizer in the local folder that the teacher was loaded from, where there is one. Nothing is compared where
            processing_class is None or the objective allows unequal vocabularies.
        options: Trainer's others: train_dataset, eval_dataset, processing_class, callbacks, optimizers and so on.

    Raises:
        TypeError, ValueError: an objective or option of another kind; a teacher with another tokenizer; what it cannot do:
            nn.DataParallel, torch_compile, context and sequence parallelism, label smoothing, compute_metrics, a loss of one's
            own.
    """

    def __init__(
        self,
        objective: OPD | TOPD,
        args: Any = None,
        data_collator: Any = None,
        *,
        rollout: Rollout | None = None,
        lmbda: float | None = None,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(objective, OPD | TOPD):
            raise TypeError(f"objective must be a topd.OPD or topd.TOPD, got {type(objective).__name__}")
        self.objective, self.rollout, self.lmbda = objective, check_rollout(rollout), check_lmbda(lmbda, rollout)
        if objective.teacher is None and isinstance(rollout, Mapping):
            raise ValueError(
                "rollout must be a function, or None, where objective.teacher is None, got options of sample_rollouts; a "
                "function (student, batch) -> batch adds the teacher_topk_logprobs and teacher_topk_ids of what it sampled"
            )
        args = copy.copy(args) if args is not None else transformers.TrainingArguments("tmp_trainer")
        check_options(args, options)
        if not objective.allow_unequal_vocabularies:
            check_tokenizers(options.get("processing_class"), teacher_processing_class, objective.teacher)
        args.remove_unused_columns = False
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(model=objective.student, args=args, data_collator=data_collator, **options)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} trains one device a process, got {self.args.n_gpu} devices in one (nn.DataParallel); "
                "start it with torchrun or accelerate launch, or make one device visible"
            )
        refuse_split_sequences(self)
        self._processes = Processes(self)
        if isinstance(objective, TOPD) and objective.process_group is None:
            objective.process_group = self._processes.group()
        self.add_callback(FollowSteps(self, lambda: self.objective))
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._totals = {"train": RunningTotals(), "eval": RunningTotals()}
        self._place_teacher()
        if self.args.world_size > 1:  # each part of the data has rollouts of its own; its order has its seed above
            transformers.set_seed(self.args.seed + self._processes.part)

    def _place_teacher(self) -> None:
        """Put the teacher in eval mode, and on the student's device where it is free to move."""
        teacher = self.objective.teacher
        if teacher is None or teacher is self.objective.student:
            return
        teacher.eval()
        if getattr(teacher, "hf_device_map", None) is None and getattr(teacher, "quantization_method", None) is None:
            teacher.to(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train as Trainer does; where a checkpoint is resumed, the objective goes on from it too."""
        load_resumed(self.objective, self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *arguments, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the micro-batches of an optimizer step with their rollouts, and how many items all processes have in them."""
        given = list(islice(epoch_iterator, num_batches))
        batches = [self._with_rollouts(batch, anew=self._anew(index)) for index, batch in enumerate(given)]
        if not batches:
            return batches, None
        items = torch.stack([count_items(batch, self.objective.config.reduction).to(device) for batch in batches]).sum()
        if self.args.average_tokens_across_devices:
            items = self._processes.total(items)
        return batches, items.clamp_min(1)

    def _anew(self, index: int) -> bool:
        """Tell whether the responses of a step's micro-batch are sampled anew: the same in every process."""
        if self.lmbda is None:
            return False
        return random.Random(f"{self.args.seed} {self.state.global_step} {index}").random() < self.lmbda

    def _with_rollouts(self, batch: Mapping[str, Any], anew: bool = False) -> Mapping[str, Any]:
        """Return a batch with its rollouts: as it came, or prompts that the student has continued."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"data_collator must make mappings of tensors, got {type(batch).__name__}")
        batch = self._prepare_inputs(dict(batch))
        if self.lmbda is not None and "response_mask" not in batch:
            raise ValueError(
                f"a batch must hold response_mask where lmbda is given, got {sorted(batch)}; lmbda mixes the data's responses "
                "with sampled ones; leave it out for prompts alone"
            )
        if "response_mask" in batch and not anew:
            return batch
        batch = without_responses(batch) if anew else batch
        missing = [key for key in ("input_ids", "attention_mask") if key not in batch]
        if missing:
            raise ValueError(
                f"a batch must hold input_ids and attention_mask, got no {missing[0]}; it has {sorted(batch)}; take a "
                "data_collator that pads prompts on the left and returns both"
            )
        if self.rollout is None:
            raise ValueError(
                f"a batch must hold response_mask where rollout is None, got {sorted(batch)}; give rollout, for instance "
                "{'max_new_tokens': 64}"
            )
        student = self.objective.student
        with self.accelerator.autocast():
            if callable(self.rollout):
                sampled = self.rollout(student, batch)
            else:
                options = {**self._readable_tokens(), **self.rollout}
                new = sample_rollouts(student, batch["input_ids"], batch["attention_mask"], **options)
                sampled = {**repeated(batch, options.get("samples_per_prompt", 1)), **new}
        if not isinstance(sampled, Mapping) or "response_mask" not in sampled:
            came = sorted(sampled) if isinstance(sampled, Mapping) else type(sampled).__name__
            raise ValueError(f"rollout must return a batch with response_mask, got {came}; see sample_rollouts for its form")
        if "teacher_input_ids" in sampled and "teacher_response_mask" not in sampled:
            prompts, mask = sampled["teacher_input_ids"], sampled.get("teacher_attention_mask")
            sampled = with_teacher_prompts(sampled, prompts, mask)  # type: ignore[arg-type]
        return self._prepare_inputs(dict(sampled))  # type: ignore[no-any-return]

    def _readable_tokens(self) -> dict[str, Any]:
        """Return the option that keeps tokens out of the rollouts which a teacher with a smaller vocabulary could not read."""
        student, teacher = self.objective.student, self.objective.teacher
        if teacher is None or vocabulary_of(teacher) >= vocabulary_of(student):
            return {}
        return {"vocabulary": vocabulary_of(teacher)}

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the objective's loss of a micro-batch that has its rollouts."""
        loss = self._loss(model, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | None = None, counted: bool = True
    ) -> Tensor:
        """Return the loss, and keep its metrics; not `counted`: they are no part of any mean."""
        metrics: dict[str, Tensor] = {}
        mode = "train" if model.training else "eval"

        def forward(batch: Mapping[str, Any]) -> Tensor:
            with self.accelerator.autocast():
                objective = self.objective(batch, num_items=num_items_in_batch)
            metrics.update(objective.metrics)
            self._totals[mode].add(objective.totals)
            return objective.loss

        loss: Tensor = inside(model, forward, inputs)
        factor, steps = 1, 1
        if num_items_in_batch is not None:
            if self.args.average_tokens_across_devices:  # the processes' gradients are averaged, their shares must add up
                factor = self._processes.parts
            steps = self.current_gradient_accumulation_steps
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        self._means[mode].add(metrics, factor * steps, counted)
        return loss * factor

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of an evaluation batch on rollouts of its own; there are no logits and no labels. Rows that the
        sampler repeats count for nothing."""
        rows, batch = rows_of(inputs), self._with_rollouts(inputs)
        kept = self._processes.new_rows(rows) * rows_of(batch) // max(rows, 1)
        if kept < rows_of(batch):
            batch = first_responses(batch, kept)
        with torch.no_grad():
            loss = self._loss(model, batch, counted=kept > 0)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Evaluate as Trainer does, and add the objective's metrics."""
        self._means["eval"].take()
        self._totals["eval"].take()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._measured("eval").items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; beside a training loss stand the objective's metrics since the last one: means over
        micro-batches, and diagnostics of all of their tokens."""
        if "loss" in logs:
            logs |= self._measured("train")
        super().log(logs, start_time)

    def _measured(self, mode: str) -> dict[str, float]:
        """Return the metrics of all processes, and start anew."""
        return self._means[mode].take(self._processes.mean) | self._totals[mode].take(self._processes.gather)


def count_items(batch: Mapping[str, Any], reduction: str) -> Tensor:
    """Return what a batch adds to a step's denominator: its response tokens, or its responses that are not empty."""
    response: Tensor = batch["response_mask"] != 0
    if reduction == "token":
        return response.sum()
    if "cu_seqlens" not in batch:
        return response.any(-1).sum()
    total = torch.cat([response.new_zeros(1, dtype=torch.int64), response.cumsum(0)])
    bounds = check_tensor("cu_seqlens", batch["cu_seqlens"], device=(response.device, "response_mask")).long()
    return (total[bounds].diff() > 0).sum()
