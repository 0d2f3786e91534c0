"""A model that teaches itself: with which of its weights, and what of them is kept between steps and in checkpoints."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from topd.models.adapters import (
    adapter_parameters,
    adapters_off,
    changed_by_adapters,
    trained_beside_adapters,
    trains_lora_alone,
)
from topd.models.head_from_model import unwrapped_model
from topd.models.sampling import eval_mode
from topd.models.weights import absent_weight, trained_parameters, weight_sample, weights_replaced
from topd.objectives.method import Method, check_state
from topd.options import SelfTeacher

INITIAL = "initial"  # the key of a sample of the initial weights in a state


class OwnTeacher(Method):
    """A student as its own teacher, by its present weights.

    Args:
        student: the model as the objective holds it.

    Attributes:
        model: whose states are the teacher's, while `in_place` is open.
    """

    def __init__(self, student: Any) -> None:
        self.model = student

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make `model` the teacher meanwhile: in eval mode, without gradients. Modes and weights come back.

        Under autocast nothing that it casts is kept: the student's pass would go on with casts without a gradient, or of other
        weights, and so would this one with the student's.
        """
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.no_grad(), eval_mode(self.model):
                yield
        finally:
            torch.set_autocast_cache_enabled(cached)


class _Initial(OwnTeacher):
    """The weights of the beginning. A checkpoint holds a sample of them: they come with the student that the run began with."""

    def __init__(self, model: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._sample = weight_sample(initial)

    def state_dict(self) -> dict[str, Tensor]:
        return {INITIAL: self._sample}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {INITIAL})
        if not torch.equal(state[INITIAL].cpu(), self._sample):
            raise ValueError(
                "student must hold the weights with which the run began when topd.OPSD is made, since they are the teacher, "
                "got others than those of the checkpoint; build it from its original weights, and let the trainer load this one"
            )


class _AdapterOff(_Initial):
    """The initial weights of a student that trains a LoRA: itself with the adapter off."""

    def __init__(self, student: Any) -> None:
        changed = changed_by_adapters(student)
        if changed is not None:
            raise ValueError(
                'student must begin at its base weights where teacher is "initial", which is the student with its adapter off, '
                f"got an adapter that is not zero, {changed}; merge it first (merge_and_unload, then a fresh adapter), or take "
                'teacher "live" or "ema"; to resume, give the student a fresh adapter and let the trainer load its checkpoint'
            )
        added = adapter_parameters(student)
        super().__init__(student, {name: each for name, each in student.named_parameters() if id(each) not in added})

    @contextmanager
    def in_place(self) -> Iterator[None]:
        trained = trained_beside_adapters(self.model)
        if trained is not None:
            raise ValueError(
                'student must train its adapters alone where teacher is "initial" and topd.OPSD was made so, got '
                f"{trained}, which requires grad now; freeze it, or make the objective anew"
            )
        with super().in_place(), adapters_off(self.model):
            yield


class _FrozenCopy(_Initial):
    """The initial weights as a copy of the whole student."""

    def __init__(self, student: Any) -> None:
        inner = unwrapped_model(student)
        absent = absent_weight(dict(inner.named_parameters()))
        if absent is not None:
            raise ValueError(
                f'student must hold its whole weights when topd.OPSD copies them for teacher "initial", got {absent} sharded '
                "or offloaded; make the objective before the model is sharded, or train a LoRA, which needs no copy"
            )
        teacher = copy.deepcopy(inner).eval().requires_grad_(False)
        super().__init__(teacher, dict(teacher.named_parameters()))


class _Average(OwnTeacher):
    """The exponential moving average of the trained parameters; what is frozen is shared."""

    def __init__(self, student: Any, decay: float) -> None:
        super().__init__(student)
        self._decay = decay
        trained = trained_parameters(student)
        absent = absent_weight(trained)
        if absent is not None:
            raise ValueError(
                f'student must hold its trained parameters whole where teacher is "ema", got {absent} sharded or offloaded; '
                'take DDP in the place of FSDP or ZeRO-3, or teacher "initial" or "live"'
            )
        with torch.inference_mode(False), torch.no_grad():
            self._average = {name: each.to(_wide(each.dtype), copy=True) for name, each in trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with torch.inference_mode(False):
            values = ((parameter, average.to(parameter.dtype)) for parameter, average in self._pairs())
            with super().in_place(), weights_replaced(values):
                yield

    def after_step(self) -> None:
        """Move the average: decay * average + (1 - decay) * parameter."""
        with torch.inference_mode(False), torch.no_grad():  # in this order: the former switches gradients on
            for parameter, average in self._pairs():
                average.lerp_(parameter.to(average.dtype), 1 - self._decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: average.clone() for name, average in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, self._average.keys())
        for name, average in self._average.items():
            if state[name].shape != average.shape:
                raise ValueError(f"state must hold {name} of shape {list(average.shape)}, got {list(state[name].shape)}")
        for name, average in self._average.items():
            average.copy_(state[name])

    def _pairs(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Return each trained parameter with its average, on its device; refuse others than there were."""
        trained = trained_parameters(self.model)
        if trained.keys() != self._average.keys() or absent_weight(trained) is not None:
            other = min(trained.keys() ^ self._average.keys(), default=absent_weight(trained))
            raise ValueError(
                'student must train the parameters, whole, that it trained when topd.OPSD was made where teacher is "ema", got '
                f"{other} changed (frozen, trained anew, sharded or renamed by a wrapper); make the objective anew, or take "
                'teacher "initial" or "live"'
            )
        for name, parameter in trained.items():
            self._average[name] = self._average[name].to(parameter.device)
        return [(parameter, self._average[name]) for name, parameter in trained.items()]


def self_teacher(student: Any, kind: SelfTeacher, decay: float) -> OwnTeacher:
    """Return the teacher that a student is to itself.

    Args:
        student: a causal language model of transformers, also inside PEFT.
        kind: "live", its present weights; "ema", the moving average of what it trains; "initial", its weights of now: with its
            adapter off where it trains a LoRA alone, else a frozen copy of all of it.
        decay: of the moving average.

    Raises:
        ValueError: "initial" with a LoRA that is not zero; weights that this process does not hold whole.
    """
    if kind == "ema":
        return _Average(student, decay)
    if kind == "live":
        return OwnTeacher(student)
    return _AdapterOff(student) if trains_lora_alone(student) else _FrozenCopy(student)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an average: a decay of 0.999 would round away in 16 bits."""
    return torch.promote_types(dtype, torch.float32)
