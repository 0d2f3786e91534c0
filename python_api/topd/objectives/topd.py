"""Trajectory-aware on-policy distillation: where the loss is high and the near future differs, the teacher's guides.

    L = L_OPD + lambda * mean over divergent points of L_traj
    L_traj(t) = 1 / K_S sum_i KL(target_i || p_S(. | x, y_<t, x^S_<i)),  target_i row i of the transport plan, normalised

The stages, in this order; those that are no methods of `TOPD` below are in look_ahead.py and guidance.py:

    _pass             one forward of each model over the rollouts; the loss and the scores of each token
    _candidates       the tokens whose score is high
    draw_windows      both models continue from the prefix before each candidate
    compare_windows   the distance between the two continuations, and the plan that moves one onto the other
    _gate             which candidates really diverge; the others are false alarms
    _weights          what a false alarm weighs in L_OPD
    guidance_of       L_traj: the student's window follows the plan's mixture of the teacher's tokens

Nothing is computed twice: the student's one forward with gradient fills the cache that its windows grow from and that their
states are computed on; the teacher's one forward gives states and cache; one `linear_divergence` gives the loss and the scores
that choose the candidates, and weights that change afterwards at false alarms cost only those rows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from topd.branching.prefill import prefill
from topd.branching.windows import Windows, refuse_split_rollouts
from topd.checks.rollouts import check_generator
from topd.models.properties import vocabulary_of
from topd.near_future.candidates import select_candidates
from topd.near_future.false_alarms import false_alarm_weights
from topd.near_future.gate import check_gate, goes_out
from topd.objectives.aligned import Aligned
from topd.objectives.batch import Padded, check_tokens, open_student
from topd.objectives.config import TOPDConfig, config_of
from topd.objectives.gating import MEMORY, Gate, Verdict, check_process_group
from topd.objectives.given_windows import check_given_windows
from topd.objectives.guidance import Reducing, guidance_of
from topd.objectives.inputs import PaddedInputs, check_padded_inputs
from topd.objectives.look_ahead import Pass, check_table, compare_windows, draw_windows, first, lowest
from topd.objectives.method import Method, with_whole_teacher
from topd.objectives.metrics import Stages, as_metrics, diagnosed, mean_scores, near_future_metrics
from topd.objectives.model_checks import ModelChecks
from topd.objectives.objective import NearFuture, Objective
from topd.objectives.observers import observable
from topd.objectives.reduction import check_items, own_items, reduce_tokens
from topd.objectives.token_losses import token_losses
from topd.objectives.topk_teacher import refuse_topk
from topd.scores import TokenScores

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup


class TOPD(Method):
    """Trajectory-aware on-policy distillation: OPD's loss, and guidance at the points where the near futures differ.

    Args:
        student, teacher: as of `OPD`. Both are used in the mode that they are in.
        config: TOPDConfig; None: its defaults.
        allow_unequal_vocabularies: as of `OPD`.
        process_group: the data-parallel processes, each with a part of a step's rollouts, whose candidates the gate judges
            together (`torch.distributed.group.WORLD`, `mesh.get_group("dp")`); all of them make every call whose gradients are
            enabled. The guidance is then weighted by the divergent points of all of them. None: a call's own candidates alone,
            but for the gate "running_quantile" those of all processes. It may be set later: `objective.process_group = group`.

    Raises:
        TypeError: config or process_group of another type, a config of another method too; a model that is none of
            transformers.
        ValueError: no teacher; vocabularies that differ by more than padding; an embedding that lacks tokens which both
            models have.

    Source: arXiv 2606.00305.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        config: TOPDConfig | None = None,
        *,
        allow_unequal_vocabularies: bool = False,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config_of(config, TOPDConfig)
        if teacher is None:
            raise ValueError(
                "teacher must be a model, which continues from prefixes of the rollouts, got None; a teacher of whom only the "
                "top-k is known serves topd.OPD"
            )
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._gate_value = check_gate("gate", self.config.gate, "gate_value", self.config.gate_value)
        self._judge = Gate(self.config.gate, self.config.gate_value, check_process_group(process_group))
        self._checks, self._aligned = ModelChecks(student, teacher, allow_unequal_vocabularies), Aligned()
        if isinstance(self.config.embedding, Tensor):
            check_table(self.config.embedding, min(vocabulary_of(student), vocabulary_of(teacher)))

    @property
    def process_group(self) -> "ProcessGroup | None":
        """The processes whose candidates the gate judges together."""
        return self._judge.group

    @process_group.setter
    def process_group(self, group: "ProcessGroup | None") -> None:
        self._judge.group = check_process_group(group)

    @observable
    @with_whole_teacher
    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items: float | Tensor | None = None,
        generator: torch.Generator | None = None,
        windows: Windows | None = None,
    ) -> Objective:
        """Return the loss of rollouts that the student sampled.

        Args:
            batch: input_ids [B, T] int64; attention_mask and response_mask [B, T] bool, or integers 0 and 1. A response token
                and the one before it are attended. Every token is one of both models. A response may be empty, and so may the
                batch: the loss and its gradients are then 0. Optional: token_weights and verdict, as of `OPD`; the weights
                multiply those of the false alarms, and leave the guidance alone. No other key.
            num_items: the denominator of a larger batch of which this is a part (gradient accumulation): its response tokens,
                or with reduction "sequence" its responses. The guidance is gated in this part, and in the parts that the other
                processes of process_group have at the same time; with guidance_reduction "points" it is weighted by their
                share of num_items. None: this batch's own.
            generator: of the models' device, for the windows; None: torch's own.
            windows: made elsewhere, by another engine or from a file, in the place of those that are drawn here: then no
                candidates are chosen and nothing is sampled. Their positions are distinct response tokens of this batch, in any
                order; K is 1 to 128, also another for each model; the teacher's tokens are those that both models have. With
                student_window "rollout" the student's tokens are the rollout's, up to the end of the response at most. All this
                is checked on the CPU. None: windows at this batch's candidates.

        Returns:
            Objective with near_future. Metrics of `OPD` with its diagnostics, and guidance_loss (loss = opd_loss +
            guidance_weight * guidance_loss), candidates, divergent_points, false_alarms (counts), low_divergence_share (false
            alarms among candidates), distance_divergent, distance_false_alarm (medians, NaN where there is none),
            marginal_error (the largest), window_length (mean over both models' windows), student_branches, teacher_branches (0
            where windows came another way), second_forward (1 where the student had to do without a cache), and
            seconds_student_windows, seconds_teacher_windows, seconds_transport, seconds_window_forward, seconds_guidance.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or range; an unknown key; a token that one of the models
                does not have (checked on the CPU); windows that do not fit the batch; gradients that several processes would
                not exchange.
        """
        refuse_topk(batch, "TOPD")
        refuse_split_rollouts()
        inputs, items, config = check_padded_inputs(batch), check_items(num_items), self.config
        rollouts = inputs.rollouts
        check_generator(generator)
        if windows is not None:
            if config.gate == "low_loss_q3":
                raise ValueError(
                    'windows must be None with gate "low_loss_q3", which draws more at tokens of low loss, got windows; '
                    "take another gate"
                )
            vocabularies = vocabulary_of(self.student), vocabulary_of(self.teacher)
            windows = check_given_windows(windows, rollouts, config, vocabularies[0], min(vocabularies))
        self._checks.before_step(self.student, self.teacher)
        stages = Stages("student_windows", "teacher_windows", "window_forward", "guidance", observer=self.observer)
        tokens = self._pass(inputs, stages, draws=windows is None)
        near_future, verdict = self._near_future(tokens, windows, generator, stages)
        weights = self._weights(tokens, near_future)
        opd_loss, share = reduce_tokens(tokens.losses.loss, rollouts, config.reduction, items, weights)
        step = Reducing(config, items, share, verdict)
        guidance = guidance_of(tokens, near_future, step, stages)
        loss = opd_loss + config.guidance_weight * guidance if config.guidance_weight else opd_loss
        totals, diagnostics = diagnosed(tokens.losses, inputs, config)
        metrics: dict[str, Tensor | float] = {
            "loss": loss,
            "opd_loss": opd_loss,
            "guidance_loss": guidance,
            "tokens": rollouts.response.sum(),
            "sequence_reduction": float(config.reduction == "sequence"),
            "second_forward": float(tokens.student_states.layers is None),
            **mean_scores(tokens.losses.scores, rollouts.response),
            **diagnostics,
            **near_future_metrics(near_future),
            **stages.seconds,
        }
        return Objective(loss, as_metrics(metrics), tokens.losses.scores, totals, near_future)

    def _pass(self, inputs: PaddedInputs, stages: Stages, draws: bool) -> Pass:
        """Run each model once, the student with gradient, and compare them at every token; keep the caches for the windows, the
        teacher's where windows are drawn."""
        rollouts = inputs.rollouts
        student, teacher = open_student(self.student, rollouts), rollouts.decoder("teacher", self.teacher)
        check_tokens(rollouts, student=self.student, teacher=self.teacher)
        self._judge.check_apart(student.output.shard)
        ids, attended = rollouts.input_ids, rollouts.attended
        with stages.stage("student_forward"):
            student_states = prefill(student, ids, attended, cache=student.keeps_cache)
        self.observer.tensor("student_hidden", student_states.hidden)
        with stages.stage("teacher_forward"), torch.no_grad():
            teacher_states = prefill(teacher, ids, attended, cache=draws and teacher.keeps_cache)
        with stages.stage("divergence"):
            head = student.head
            sides = (student_states.hidden, head), (teacher_states.hidden, self._aligned(teacher.head, head))
            losses = token_losses(*sides, inputs, self.config)
        self.observer.tensor("token_losses", losses.loss)
        return Pass(inputs, student, teacher, student_states, teacher_states, losses)

    def _near_future(
        self, tokens: Pass, windows: Windows | None, generator: torch.Generator | None, stages: Stages
    ) -> tuple[NearFuture, Verdict]:
        """Look ahead at the candidates, or at the points of the windows that are given, and judge them."""
        config, rollouts = self.config, tokens.inputs.rollouts
        score, count = score_of(tokens.losses.scores, config.score), None
        if windows is None:
            positions = self._candidates(score, rollouts)
            if config.gate == "low_loss_q3":
                count = positions.shape[0]
                positions = torch.cat([positions, lowest(score, rollouts.response, positions)])
            windows = draw_windows(tokens, positions, config, generator, stages)
            self._checks.of_windows(windows)
        transport, low_loss = compare_windows(tokens, windows, config, stages), None
        if count is not None:
            low_loss = transport.distance[count:]
            windows, transport = first(count, windows, transport)
        verdict = self._gate(transport.distance, low_loss, own_items(rollouts, config.reduction))
        return NearFuture(windows, transport, verdict.divergent, score), verdict

    def _candidates(self, score: Tensor, rollouts: Padded) -> Tensor:
        """Choose the candidates, positions [m, 2], by the score [B, T] of the response tokens."""
        config = self.config
        return select_candidates(
            score,
            mask=rollouts.response,
            rule=config.candidates,
            value=config.candidate_value,
            min_separation=config.min_separation,
        )

    def _gate(self, distance: Tensor, low_loss: Tensor | None, items: Tensor) -> Verdict:
        """Decide which candidates really diverge: those whose distance is high too."""
        verdict, value = self._judge(distance, low_loss, items), self._gate_value
        count = verdict.candidates
        if self.config.gate == "lowest_fraction_out" and value and count and not goes_out(value, count):
            self._checks.warn_once(
                "gate",
                f'gate "lowest_fraction_out" lets all {count} candidates of this call through, since {value:g} of them is less '
                f'than one: there is no false alarm; take larger micro-batches, or gate="running_quantile", which remembers '
                f"the last {MEMORY}",
            )
        return verdict

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the student: with gate "running_quantile" its distances, else nothing."""
        return self._judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            TypeError, ValueError: the state of an objective with another gate.
        """
        self._judge.load_state_dict(state)

    def _weights(self, tokens: Pass, near_future: NearFuture) -> Tensor | None:
        """Return what each token weighs in L_OPD, [B, T], where false alarms weigh less; None: all weigh 1."""
        inputs, mode = tokens.inputs, self.config.false_alarms
        own = inputs.token_weights
        if mode == "keep":
            return own
        loss, positions = tokens.losses.loss.detach(), near_future.windows.positions
        weights = false_alarm_weights(loss, positions, near_future.divergent, mask=inputs.rollouts.response, mode=mode)
        return weights if own is None else weights * own


def score_of(scores: TokenScores, name: str) -> Tensor:
    """Return the score [B, T] by which candidates are chosen."""
    assert scores.teacher_logprob is not None
    assert scores.student_logprob is not None
    if name == "reverse_kl":
        return scores.reverse_kl
    if name == "gap":
        return scores.student_logprob - scores.teacher_logprob
    return -(scores.teacher_logprob if name == "teacher_nll" else scores.student_logprob)
