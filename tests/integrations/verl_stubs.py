"""Stand-ins for verl with its exact signatures: the registries, the FSDP engine and the forward that topd's stand beside.

Read in verl 0.9.0, 0.9.1 and the source of 0.10.0 (commit 1dda039b), where they are the same. Signatures alone: what stands in
the bodies is of these tests, and small: no padding, no Ulysses.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.nested import nested_tensor_from_jagged

LOSSES: dict[str, Any] = {}
SETTINGS: dict[str, Any] = {}
ENGINES: dict[Any, Any] = {}


@dataclass
class DistillationLossSettings:
    names: str | list[str] = field(default_factory=list)
    use_topk: bool = False
    use_estimator: bool = False


def register_distillation_loss(loss_settings):
    def decorator(func):
        for name in loss_settings.names:
            LOSSES[name], SETTINGS[name] = func, loss_settings
        return func

    return decorator


def forward_with_torch_backend(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=None,
    cache_position=None,
    logits_to_keep=0,
    temperature=1.0,
    shift_labels=None,
    **loss_kwargs,
):
    """Has a signature alone."""


class EngineRegistry:
    @classmethod
    def register(cls, model_type, backend, device="cuda", vendor=None):
        def decorator(engine_class):
            key = model_type, tuple(backend), device, vendor
            assert key not in ENGINES
            ENGINES[key] = engine_class
            return engine_class

        return decorator


class FSDPEngineWithLMHead:
    """Packs the sequences, and reads the forward's outputs as verl does with fused kernels and without padding."""

    use_ulysses_sp = False

    def _build_module(self):
        return self.built

    def prepare_model_inputs(self, micro_batch):
        input_ids = micro_batch["input_ids"]
        packed, rolled = input_ids.values().unsqueeze(0), input_ids.values().roll(-1).unsqueeze(0)
        position_ids = micro_batch["position_ids"].values().unsqueeze(0)
        model_inputs = {"input_ids": packed, "attention_mask": None, "position_ids": position_ids, "shift_labels": rolled}
        return model_inputs | {"temperature": micro_batch["temperature"], "return_dict": True}, {}

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        offsets = micro_batch["input_ids"].offsets()
        model_output = {}
        if not micro_batch["distillation_only"]:
            model_output["log_probs"] = nested_tensor_from_jagged(output.log_probs.squeeze(0), offsets)
        if micro_batch["calculate_entropy"]:
            model_output["entropy"] = nested_tensor_from_jagged(output.entropy.squeeze(0), offsets)
        if micro_batch["distillation_use_topk"] and output.fused_linear_aux is not None:
            for name in ("distillation_losses", "student_mass", "teacher_mass"):
                model_output[name] = nested_tensor_from_jagged(getattr(output.fused_linear_aux, name).squeeze(0), offsets)
        return model_output


def no_padding_2_padding(tensor, data):
    values, lengths = tensor.values(), data["responses"].offsets().diff()
    rows = [values[end - n - 1 : end - 1] for n, end in zip(lengths.tolist(), data["input_ids"].offsets()[1:], strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def get_non_tensor_data(data, key, default):
    return data.get(key, default)


def modules(version: str = "0.9.1", forward: Any = forward_with_torch_backend) -> dict[str, Any]:
    """Return the modules of verl that topd imports, by name."""
    contents = {
        "verl": {"__version__": version},
        "verl.models.transformers.dense_common": {"forward_with_torch_backend": forward},
        "verl.trainer.distillation.losses": {
            "register_distillation_loss": register_distillation_loss,
            "DistillationLossSettings": DistillationLossSettings,
        },
        "verl.workers.engine": {"EngineRegistry": EngineRegistry, "FSDPEngineWithLMHead": FSDPEngineWithLMHead},
        "verl.workers.utils.padding": {"no_padding_2_padding": no_padding_2_padding},
        "verl.utils.tensordict_utils": {"get_non_tensor_data": get_non_tensor_data},
        "verl.utils.device": {"get_vendor": lambda: "nvidia"},
    }
    by_name: dict[str, Any] = {}
    for name, values in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            by_name.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(by_name[name]).update(values)
    for name, module in by_name.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(by_name[parent], own, module)
    return by_name


def install() -> None:
    """Put the stand-ins in the place of verl in this process."""
    sys.modules.update(modules())
