"""On-policy self-distillation: one model is both; the teacher reads another prompt before the same response.

    L = mean over response tokens of D(p(. | x, y*, y_<t) || p_theta(. | x, y_<t)),  y ~ p_theta(. | x)

The teacher sees the reference solution y* (or whatever else its prompt holds), the student does not. Which weights the teacher
has is in `self_teacher`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from topd.head import Head
from topd.objectives.batch import Batch, check_tokens
from topd.objectives.config import OPSDConfig, config_of
from topd.objectives.inputs import Inputs
from topd.objectives.opd import OPD
from topd.objectives.self_teacher import self_teacher


class OPSD(OPD):
    """On-policy self-distillation: a model learns from itself, which has read more.

    Batches are those of `OPD`, and must hold the teacher's side, which is optional there: teacher_input_ids,
    teacher_attention_mask and teacher_response_mask, its prompts before the same responses, or both sides packed. `topd.pair`
    makes them of lists of ids. The teacher's weights are those of `config.teacher`:

    - "initial": what the student has when this is made. Where it trains a LoRA alone (PEFT, also with modules_to_save), that is
      the student with its adapter off, head included, which costs no memory; a LoRA that is not zero then is refused. Any other
      student is copied whole: its weights once more, on its device, before it is sharded. Where a run is resumed, build the
      student as the run began, and load its checkpoint after this, as the trainers do; `state_dict` has a sample of the initial
      weights, and `load_state_dict` refuses others.
    - "live": the present ones.
    - "ema": an exponential moving average of all that the student trains, which begins at the present weights and which
      `after_step` moves; what is frozen is shared. Parameters of 16 bits are averaged in float32 and cast for the teacher's
      pass. That is little memory with a LoRA, else all of the trained parameters once more. Sharded ones (FSDP, ZeRO-3) are
      refused.

    The model is in eval mode for the teacher's pass, which has no gradient; the modes of its modules come back, also after an
    error.

    Args:
        student: as of `OPD`.
        config: OPSDConfig; None: its defaults.

    Attributes:
        teacher: the model that the teacher's pass runs: the student itself, which computes with the teacher's weights while
            `teaching` is open, or its frozen copy.

    Raises:
        TypeError: config of another type; a model that is none of transformers.
        ValueError: "initial" with a LoRA that is not zero; weights that this process does not hold whole. At a call, beside
            those of `OPD`: what the student trains has changed since this was made; adapters that are merged.

    Source: arXiv 2601.18734: forward KL with the clip per entry, a teacher frozen at step 0, in its code a LoRA turned off, or
    an average. "live" and the decay of 0.999 are our choice.
    """

    config_type = OPSDConfig
    demands_pairs = True

    def __init__(self, student: Any, config: OPSDConfig | None = None) -> None:
        chosen = config_of(config, OPSDConfig)
        self._self_teacher = self_teacher(student, chosen.teacher, chosen.ema_decay)
        super().__init__(student, self._self_teacher.model, chosen)

    def _check_models(self, inputs: Inputs) -> None:
        """Check before a step that the student can take it, and has the tokens that both sides read."""
        self._checks.before_step(self.student, None)  # the teacher is the student, in eval mode for its pass
        check_tokens(inputs.rollouts, student=self.student)
        check_tokens(inputs.teacher_batch, "teacher_", teacher=self.student)

    def _teacher_states(self, teacher_batch: Batch) -> tuple[Tensor, Head]:
        """Return the states of the model as its own teacher, and its head as it is then."""
        with self.teaching() as teacher:
            decoder = teacher_batch.decoder("teacher", teacher)
            return teacher_batch.hidden(decoder), decoder.head.detach()

    @contextmanager
    def teaching(self) -> Iterator[Any]:
        """Make `teacher` compute with the teacher's weights meanwhile, in eval mode and without gradients, and return it; the
        student's weights, adapters and modes come back, also after an error::

            with objective.teaching() as teacher:
                answers = teacher.generate(**prompts)
        """
        with self._self_teacher.in_place():
            yield self.teacher

    def after_step(self) -> None:
        """Take note of an optimizer step, after each: it moves the average of teacher "ema". Trainers of topd call it."""
        self._self_teacher.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the student.

        Returns:
            With "ema" the average, by the parameters' names; with "initial" a sample of the initial weights; with "live"
            nothing.
        """
        return self._self_teacher.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            TypeError, ValueError: the state of another teacher; with "initial", of a run that began at other weights.
        """
        self._self_teacher.load_state_dict(state)
