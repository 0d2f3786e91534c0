"""verl's FSDP engine with topd's losses: no logits of all tokens, and the divergence over the whole vocabulary.

`register` is called once in every worker, in a module that verl imports there (VERL_USE_EXTERNAL_MODULES). It registers

- a distillation loss by verl's `register_distillation_loss`, under a name for `distillation.distillation_loss.loss_mode`;
- an engine in the place of verl's own FSDP engine for this vendor's GPUs. It hands the teacher's rows of a micro-batch to the
  model's forward, which is `forward_with_topd`.

The forward puts the losses where verl looks for them, in the output's `fused_linear_aux`; the registered function cuts them to
the responses.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from topd.divergences import Divergence, DivergenceLike, resolve_divergence
from topd.head import Head
from topd.integrations.verl_rows import DIRECTIONS, TeacherRows, output_types, rows_of, setting
from topd.losses.linear_logprobs import linear_logprobs

KNOWN = "0.9 and 0.10"  # versions of verl whose signatures were read
ROWS = "topd_rows"  # the argument by which the engine hands the teacher's rows to the forward
SETTINGS_TAKE = ("names", "use_topk")
ENGINE_TAKES = {
    "_build_module": ("self",),
    "prepare_model_inputs": ("self", "micro_batch"),
    "prepare_model_outputs": ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
}


def register(
    name: str = "topd",
    *,
    teacher: Callable[[], Head] | None = None,
    divergence: DivergenceLike = "reverse_kl",
) -> None:
    """Register a distillation loss and an FSDP engine with verl: once in each process.

    Args:
        name: for verl's option `distillation.distillation_loss.loss_mode`.
        teacher: a function that returns the teacher's Head on this worker's device; called once, before the first loss. Then
            each batch has `teacher_hidden`, the teacher's states after its final norm: a nested tensor, a row for each token of
            `input_ids`. None: the loss compares with verl's own `teacher_ids` and `teacher_logprobs`, the top-k of its
            teacher's server, by `topd.topk_divergence`.
        divergence: as in `topd.linear_divergence`; "forward_kl" or "reverse_kl" where `teacher` is None.

    Raises:
        ImportError: verl is missing, or has other signatures than those that this module knows.
        TypeError, ValueError: a wrong type, a divergence that a top-k cannot serve, a name or an engine that verl has already.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if teacher is not None and not callable(teacher):
        raise TypeError(f"teacher must be a function without arguments that returns a topd.Head, got {type(teacher).__name__}")
    chosen = resolve_divergence(divergence)
    if teacher is None and chosen.name not in DIRECTIONS:
        raise ValueError(
            f'divergence must be "forward_kl" or "reverse_kl" where teacher is None, got {chosen.name!r}, which a top-k does '
            "not determine; give teacher, and the teacher's hidden states in each batch"
        )
    check_host()
    from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
    from verl.utils.device import get_vendor
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    key: dict[str, Any] = {"backend": ["fsdp", "fsdp2"], "device": "cuda", "vendor": get_vendor()}
    try:
        EngineRegistry.register(model_type="language_model", **key)(engine_of(FSDPEngineWithLMHead, teacher, chosen))
    except AssertionError as error:
        raise ValueError(
            f"verl has an FSDP engine for {key['vendor']} already, from another call of register or another package; call it "
            "once in a process"
        ) from error
    # verl has losses of two kinds, from a top-k and from the sampled token. It lets the forward compute the first kind.
    register_distillation_loss(DistillationLossSettings(names=[name], use_topk=True))(response_losses)


def response_losses(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the losses of the response tokens: the function that is registered with verl.

    Args:
        config: verl's ActorConfig.
        distillation_config: verl's DistillationConfig.
        model_output: of the forward; `distillation_losses` is read.
        data: the micro-batch.

    Returns:
        A pair of the losses [B, R] float32, nats, 0 beyond a response, and the metrics, their mean.

    Raises:
        ValueError: the forward made no losses, or verl would use them as rewards.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    if distillation_config.distillation_loss.use_policy_gradient:
        raise ValueError(
            "distillation.distillation_loss.use_policy_gradient must be False with a loss of topd, got True: verl would detach "
            "the losses and use them as rewards; set it to False"
        )
    losses = model_output.get("distillation_losses")
    if losses is None:
        raise ValueError(
            "the model's forward made no distillation losses; they come from topd's FSDP engine: set "
            "actor_rollout_ref.model.use_fused_kernels=True and use_remove_padding=True, an FSDP strategy, and let every "
            "worker call topd.integrations.verl.register (VERL_USE_EXTERNAL_MODULES)"
        )
    losses, mask = no_padding_2_padding(losses, data), data["response_mask"]
    mask = (mask.to_padded_tensor(0, output_size=tuple(losses.shape)) if mask.is_nested else mask).bool()
    return losses, {"distillation/mean_nats": losses.detach()[mask].mean().item()}


def forward_with_topd(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    cache_position: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,
    **loss_kwargs: Any,
) -> Any:
    """Return a causal language model's output with log-probabilities, entropy and distillation losses, and without logits.

    A method of a model of transformers, with the arguments of verl's `dense_common.forward_with_torch_backend`.

    Args:
        shift_labels: [B, T], the token after each one; None: `labels`, else `input_ids`, moved by one.
        temperature: > 0, of the log-probabilities and of the losses.
        loss_kwargs: `topd_rows`, a TeacherRows, where losses are wanted; all others are ignored, as in verl.
        others: as in the model's own forward.

    Returns:
        `log_probs` and `entropy` [B, T] float32, nats; `fused_linear_aux` with `distillation_losses`, or None.

    Raises:
        ValueError: nothing to take the next tokens from, or what topd's losses refuse.
    """
    given = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
        "cache_position": cache_position,
    }
    outputs = self.base_model(input_ids=input_ids, **{name: value for name, value in given.items() if value is not None})
    hidden, head = outputs[0], Head.from_model(self)
    rows: TeacherRows | None = loss_kwargs.get(ROWS)
    output_type, rows_type = output_types()
    output = output_type(
        past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
    if rows is not None:
        output.fused_linear_aux = rows_type(*rows.losses(hidden, head, float(temperature)))
    if rows is None or rows.wants_logprobs:
        following = _following(shift_labels, labels, input_ids)
        logprobs, entropy = linear_logprobs(
            hidden, head, following.unsqueeze(-1), temperature=float(temperature), return_entropy=True
        )
        output.log_probs, output.entropy = logprobs[..., 0], entropy
    return output


def _following(shift_labels: Tensor | None, labels: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """Return the token after each one."""
    if shift_labels is not None:
        return shift_labels
    tokens = input_ids if labels is None else labels
    if tokens is None:
        raise ValueError("the forward needs shift_labels, labels or input_ids, got none of them; pass one")
    return torch.roll(tokens, -1, -1)


def engine_of(base: Any, teacher: Callable[[], Head] | None, divergence: Divergence) -> Any:
    """Return a subclass of verl's FSDPEngineWithLMHead whose model has `forward_with_topd`; the rest as in `register`."""

    class TopdEngine(base):  # type: ignore[misc]
        """verl's FSDP engine, whose forward gets the teacher's rows of the micro-batch."""

        topd_head: Head | None = None

        def _build_module(self) -> Any:
            module = super()._build_module()
            if self.model_config.use_fused_kernels:
                module.forward = MethodType(forward_with_topd, module)
            return module

        def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            model_inputs, output_args = super().prepare_model_inputs(micro_batch)
            if setting(micro_batch, "distillation_use_topk", False):
                if teacher is not None and self.topd_head is None:
                    self.topd_head = teacher().detach()
                model_inputs[ROWS] = rows_of(micro_batch, self.topd_head, divergence, ulysses=self.use_ulysses_sp)
            return model_inputs, output_args

    return TopdEngine


def check_host() -> None:
    """Check that the installed verl has the signatures that this module knows.

    Raises:
        ImportError: verl is missing, or has others; the message names both versions.
    """
    try:
        from verl.models.transformers.dense_common import forward_with_torch_backend
        from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
        from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
    except ImportError as error:
        raise ImportError(f"topd.integrations.verl needs verl {KNOWN}, {_version()} is installed: {error}") from error
    engine = {name: getattr(FSDPEngineWithLMHead, name, None) for name in ENGINE_TAKES}
    expected = {
        "dense_common.forward_with_torch_backend": (forward_with_torch_backend, tuple(_names(forward_with_topd))),
        "register_distillation_loss": (register_distillation_loss, ("loss_settings",)),
        "EngineRegistry.register": (EngineRegistry.register, ("model_type", "backend", "device", "vendor")),
        **{f"FSDPEngineWithLMHead.{name}": (engine[name], names) for name, names in ENGINE_TAKES.items()},
    }
    changed = [f"{what}{_names(each)}" for what, (each, names) in expected.items() if _names(each) != names]
    if not set(SETTINGS_TAKE) <= set(_names(DistillationLossSettings)):
        changed.append(f"DistillationLossSettings{_names(DistillationLossSettings)}")
    if changed:
        raise ImportError(
            f"topd.integrations.verl knows the signatures of verl {KNOWN}; verl {_version()} is installed, and has others: "
            f"{', '.join(changed)}; install one of these versions"
        )


def _names(function: Any) -> tuple[str, ...]:
    """Return the names of a function's arguments; of none where there is no function."""
    return () if function is None else tuple(inspect.signature(function).parameters)


def _version() -> str:
    """Return the installed version of verl."""
    try:
        import verl
    except ImportError:
        return "none"
    return str(getattr(verl, "__version__", "of an unknown version"))
