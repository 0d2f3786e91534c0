"""Options of the objectives; a wrong one is refused when the configuration is created, not when a step runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, get_args

from torch import Tensor

from topd.branching.windows import STUDENT_WINDOWS, check_window_noise
from topd.checks.rollouts import end_tokens
from topd.checks.values import FLOATING, check_rule_value, check_temperature, check_tensor, choice, flag, positive_int, real
from topd.divergences import JSD, DivergenceLike, ForwardKL, ReverseKL, resolve_divergence
from topd.losses.topk_divergence import SUPPORTS
from topd.near_future.candidates import CANDIDATE_RULES
from topd.near_future.false_alarms import FALSE_ALARM_MODES
from topd.near_future.gate import check_gate
from topd.near_future.transport import SOLVERS
from topd.ops.transport.spec import COSTS, MAX_WINDOW
from topd.options import (
    CandidateRule,
    Cost,
    EmbeddingName,
    FalseAlarmMode,
    GateRule,
    GuidanceReduction,
    Reduction,
    ScoreName,
    SelfTeacher,
    Solver,
    StudentWindow,
    Support,
    WindowNoise,
)

Config = TypeVar("Config")
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
SCORES: tuple[str, ...] = get_args(ScoreName)
EMBEDDINGS: tuple[str, ...] = get_args(EmbeddingName)
GUIDANCE_REDUCTIONS: tuple[str, ...] = get_args(GuidanceReduction)
SELF_TEACHERS: tuple[str, ...] = get_args(SelfTeacher)
OPSD_DIVERGENCE = ForwardKL(entry_clip=0.05)
EMA_DECAY = 0.999


@dataclass(frozen=True)
class OPDConfig:
    """Options of on-policy distillation.

    `OPDConfig(**dataclasses.asdict(config))` is the same again, also by way of YAML or JSON.

    Args:
        divergence: per response token: a name, a `topd` divergence, or a mapping of its name and parameters such as
            {"name": "jsd", "beta": 0.3}, which becomes the divergence.
        temperature: > 0, of both models in every score and loss.
        reduction: "token", the mean over all response tokens of the batch; "sequence", the mean over each response, then over
            the responses that are not empty.
        hard_weight: >= 0, weight of -log p_S of the rollout's own tokens.
        topk_support: as support of `topk_divergence`, where the teacher is known by its top-k alone (`OPD` with teacher=None).
        position_clip: None, or c > 0, nats: a token's loss is min(D, c), D summed over the vocabulary; above c it has no
            gradient. Not with hard_weight.
        top_k: None, or k >= 1, at most the vocabulary that both models have: both sides are renormalised on the teacher's k
            most likely tokens, of a teacher model. For forward_kl without entry_clip, reverse_kl and jsd.
        epistemic_ids: None, or tokens whose probability under a teacher model becomes the metric epistemic_mass:
            `topd.trd.epistemic_ids(tokenizer)`. Costs one product of the teacher's states and head a step, in chunks.
        teacher_top2: whether the metrics bimodal_share and fragmented_share are measured, of a teacher model. Costs one product
            of the teacher's states and head a step, in chunks, beside that of epistemic_ids.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or two that do not go together.

    Source: arXiv 2606.00305: reverse KL over the full vocabulary. position_clip and top_k: baselines of arXiv 2606.08432, Table
    13; epistemic_ids: its diagnostics. The reductions, hard_weight and teacher_top2 are our options.
    """

    divergence: DivergenceLike = "reverse_kl"
    temperature: float = 1.0
    reduction: Reduction = "token"
    hard_weight: float = 0.0
    topk_support: Support = field(default="tail", kw_only=True)
    position_clip: float | None = field(default=None, kw_only=True)
    top_k: int | None = field(default=None, kw_only=True)
    epistemic_ids: Sequence[int] | None = field(default=None, kw_only=True)
    teacher_top2: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        divergence = resolve_divergence(self.divergence)
        if isinstance(self.divergence, Mapping):
            object.__setattr__(self, "divergence", divergence)
        check_temperature(self.temperature)
        choice("reduction", self.reduction, REDUCTIONS)
        real("hard_weight", self.hard_weight, low=0.0)
        choice("topk_support", self.topk_support, SUPPORTS)
        if self.position_clip is not None:
            real("position_clip", self.position_clip, low=0.0, open_low=True, hint="None means no clip")
            if self.hard_weight:
                raise ValueError(
                    f"position_clip clips the divergence alone, got hard_weight={self.hard_weight!r} beside it, which adds to "
                    "the same loss; leave one of the two out"
                )
        if self.top_k is not None:
            positive_int("top_k", self.top_k, hint="None for the whole vocabulary")
            if not isinstance(divergence, JSD) and divergence not in (ForwardKL(), ReverseKL()):
                raise ValueError(
                    'top_k takes "forward_kl" without an entry_clip, "reverse_kl" or "jsd", got the divergence '
                    f"{divergence}; take one of these, or leave top_k out"
                )
        if self.epistemic_ids is not None:
            object.__setattr__(self, "epistemic_ids", _distinct_ids("epistemic_ids", self.epistemic_ids))
        flag("teacher_top2", self.teacher_top2)

    def _refuse_topk_support(self, method: str) -> None:
        """Refuse the option that belongs to a teacher known by its top-k, which a method cannot have."""
        if self.topk_support != "tail":
            raise ValueError(
                f"topk_support is of topd.OPD with teacher=None, got {self.topk_support!r} for topd.{method}, whose teacher is "
                "a model; leave it out"
            )


@dataclass(frozen=True)
class TRDConfig(OPDConfig):
    """Options of trajectory-refined distillation: those of `OPDConfig`, of which one has another default.

    Args:
        divergence: as in `OPDConfig`; here the forward KL, over the full vocabulary and without a clip.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or two that do not go together.

    Source: arXiv 2606.08432: eq. 6, temperature 1. Its mean over responses of their means is the reduction "sequence"; its
    authors' code takes "token", our default.
    """

    divergence: DivergenceLike = "forward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_topk_support("TRD")


@dataclass(frozen=True)
class OPSDConfig(OPDConfig):
    """Options of on-policy self-distillation, beside those of `OPDConfig`, of which one has another default.

    Args:
        divergence: as in `OPDConfig`; here the forward KL whose entries are clipped at 0.05.
        teacher: which weights teach: "initial", the student's at construction; "live", those that are trained; "ema", their
            exponential moving average.
        ema_decay: 0 <= d < 1, of the average: after each step it is d times itself plus (1 - d) times the student. Only with
            "ema".

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or two that do not go together.

    Source: arXiv 2601.18734: forward KL, the clip, a teacher frozen at step 0 or averaged. The decay is our default.
    """

    divergence: DivergenceLike = OPSD_DIVERGENCE
    teacher: SelfTeacher = field(default="initial", kw_only=True)
    ema_decay: float = field(default=EMA_DECAY, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_topk_support("OPSD")
        choice("teacher", self.teacher, SELF_TEACHERS)
        real("ema_decay", self.ema_decay, low=0.0, high=1.0, open_high=True, hint='for 1, which never moves, take "initial"')
        if self.teacher != "ema" and self.ema_decay != EMA_DECAY:
            raise ValueError(
                f'ema_decay is of teacher="ema", got {self.ema_decay!r} and teacher={self.teacher!r}; leave one of them out'
            )


@dataclass(frozen=True)
class TOPDConfig(OPDConfig):
    """Options of trajectory-aware on-policy distillation, beside those of `OPDConfig`.

    Args:
        score: by which tokens become candidates, nats: "teacher_nll", -log p_T; "reverse_kl", KL(p_S || p_T); "student_nll",
            -log p_S; "gap", log p_S - log p_T.
        candidates, candidate_value, min_separation: as rule, value and min_separation of `select_candidates`; the default value
            belongs to "top_fraction".
        horizon: 1 to 128, tokens of a window.
        student_window: "regenerate", the student continues from the prefix; "rollout", its window is the rollout itself, up to
            where the response ends.
        window_temperature: >= 0, at which windows are sampled; 0 is greedy.
        window_noise: as in `sample_windows`: "independent"; "shared", of "regenerate"; "counterfactual", of "rollout", with the
            window_temperature at which the rollouts were sampled. Both want one > 0.
        eos_token_id: an int or a list, as in `sample_windows`; None: both models' own, [] for none.
        cost, solver, epsilon: as in `near_future_divergence`.
        embedding: where tokens are compared: "student" or "teacher", that model's input embeddings; a table [V, d] with a row
            for each token that both models have; or "student_hidden", the student's states at the windows' tokens, which costs
            it a pass over both windows. The student's windows are drawn from the tokens that have a row there.
        gate, gate_value: as rule and value of `divergent`.
        guidance_weight: >= 0, lambda.
        guidance_reduction: "points", the mean of L_traj over the divergent points of a call; "tokens", each point's L_traj is
            added to its token's loss and reduced like it: their sum over the number of response tokens, or with reduction
            "sequence" over those of each response, then over the responses. It is additive over micro-batches.
        false_alarms: as mode of `false_alarm_weights`, whose score is the token's own loss, position_clip and hard_weight
            included: with "cap" a false alarm adds no more than the median loss of its response.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or two that do not go together.

    Source: arXiv 2606.00305 for the method, candidates' share, horizon, gate by a high distance, guidance and "keep"; it
    publishes no score, decoding, cost, embedding, solver, gate rule or lambda: those defaults are ours.
    """

    score: ScoreName = "teacher_nll"
    candidates: CandidateRule = "top_fraction"
    candidate_value: float = 0.0225
    min_separation: int = 0
    horizon: int = 50
    student_window: StudentWindow = "regenerate"
    window_temperature: float = 1.0
    cost: Cost = "cosine"
    embedding: EmbeddingName | Tensor = "student"
    solver: Solver = "sinkhorn"
    epsilon: float = 0.05
    gate: GateRule = "lowest_fraction_out"
    gate_value: float | None = None
    guidance_weight: float = 0.1
    false_alarms: FalseAlarmMode = "keep"
    eos_token_id: int | list[int] | None = field(default=None, kw_only=True)
    window_noise: WindowNoise = field(default="independent", kw_only=True)
    guidance_reduction: GuidanceReduction = field(default="points", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("score", self.score, SCORES)
        choice("candidates", self.candidates, CANDIDATE_RULES)
        check_rule_value("candidates", self.candidates, "candidate_value", self.candidate_value)
        if type(self.min_separation) is not int or self.min_separation != 0:
            positive_int("min_separation", self.min_separation, hint="or 0, for none")
        if positive_int("horizon", self.horizon) > MAX_WINDOW:
            raise ValueError(f"horizon must be at most {MAX_WINDOW}, the transport's longest window, got {self.horizon}")
        choice("student_window", self.student_window, STUDENT_WINDOWS)
        end_tokens(self.eos_token_id)
        real("window_temperature", self.window_temperature, low=0.0, hint="0 is greedy")
        check_window_noise(self.window_noise, self.student_window, "window_temperature", self.window_temperature)
        choice("cost", self.cost, COSTS)
        choice("solver", self.solver, SOLVERS)
        real("epsilon", self.epsilon, low=0.0, open_low=True)
        self._check_embedding()
        check_gate("gate", self.gate, "gate_value", self.gate_value)
        self._refuse_topk_support("TOPD")
        real("guidance_weight", self.guidance_weight, low=0.0)
        choice("guidance_reduction", self.guidance_reduction, GUIDANCE_REDUCTIONS)
        choice("false_alarms", self.false_alarms, FALSE_ALARM_MODES)

    def _check_embedding(self) -> None:
        """Check that the embedding is a name or a table, and that the cost can use it."""
        if isinstance(self.embedding, Tensor):
            if check_tensor("embedding", self.embedding, dtype=FLOATING).dim() != 2:
                raise ValueError(f"embedding must be a table [V, d], got {list(self.embedding.shape)}")
        elif not isinstance(self.embedding, str):
            raise TypeError(f"embedding must be a name or a tensor [V, d], got {type(self.embedding).__name__}")
        else:
            choice("embedding", self.embedding, EMBEDDINGS)
        if self.cost == "mismatch" and self.embedding == "student_hidden":
            raise ValueError('cost "mismatch" compares tokens, got embedding "student_hidden"; take another of the two')


def _distinct_ids(name: str, ids: object) -> tuple[int, ...]:
    """Check for ids of distinct tokens, one at least, and return them."""
    if isinstance(ids, str) or not isinstance(ids, Sequence) or any(type(each) is not int for each in ids):
        raise TypeError(f"{name} must be a list of ids, ints, got {ids!r}; topd.trd.epistemic_ids(tokenizer) makes one")
    if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
        raise ValueError(f"{name} must hold distinct ids >= 0, one at least, got {list(ids)}; leave repeats out, or take None")
    return tuple(ids)


def config_of(config: object, kind: type[Config]) -> Config:
    """Return an objective's configuration: as given, of its very kind, or that kind's defaults."""
    if config is None:
        return kind()
    if type(config) is not kind:
        came = type(config).__name__
        other = f"; topd.{came.removesuffix('Config')} takes that one" if type(config).__module__ == __name__ else ""
        raise TypeError(f"config must be a topd.{kind.__name__}, got {came}{other}")
    return config
