"""Stand-ins for Megatron core with its exact signatures: `GPTModel.forward`, its call of an output processor, the output layer.

Read in megatron-core 0.18.0, 0.19.2 and the source of 0.20.0 (commit d98e8a64), where they are the same. Signatures alone: what
stands in the bodies is of these tests.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class ColumnParallelLinear(torch.nn.Module):
    """This rank's rows of an output layer."""

    def __init__(self, weight, tp_group=None, sequence_parallel=False, bias=None):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.bias = None if bias is None else torch.nn.Parameter(bias.clone())
        self.skip_bias_add, self.tp_group, self.sequence_parallel = False, tp_group, sequence_parallel
        self.output_size_per_partition = weight.shape[0]
        self.output_size = weight.shape[0] * (1 if tp_group is None else tp_group.size())

    def forward(self, input_, weight=None, runtime_gather_output=None):
        raise AssertionError("the output layer must not run: it would form logits")


ColumnParallelLinear.forward.__module__ = "megatron.core.tensor_parallel.layers"


class GPTModel(torch.nn.Module):
    """A model whose decoder is the identity: `decoder_input` [s, b, h] are its hidden states."""

    def __init__(self, output_layer, output_weight=None, factor=1.0, **config):
        super().__init__()
        self.output_layer, self.output_weight, self.factor = output_layer, output_weight, factor
        self.config = SimpleNamespace(**config)

    def forward(
        self,
        input_ids,
        position_ids,
        attention_mask,
        decoder_input=None,
        labels=None,
        inference_context=None,
        packed_seq_params=None,
        extra_block_kwargs=None,
        runtime_gather_output=None,
        *,
        inference_params=None,
        loss_mask=None,
        padding_mask=None,
        output_processor=None,
        output_processor_context=None,
    ):
        return output_processor(
            hidden_states=decoder_input,
            output_layer=self.output_layer,
            output_weight=self.output_weight,
            labels=labels,
            loss_mask=loss_mask,
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            decoder_input=decoder_input,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
            runtime_gather_output=runtime_gather_output,
            context=output_processor_context,
            compute_language_model_loss=None,
            scale_logits=self._scale_logits,
            config=self.config,
        )

    def _scale_logits(self, logits):
        return logits * self.factor


def modules(version: str = "0.19.2", model: type = GPTModel) -> dict[str, Any]:
    """Return the modules of Megatron that topd imports, by name."""
    names = [
        "megatron",
        "megatron.core",
        "megatron.core.models",
        "megatron.core.models.gpt",
        "megatron.core.models.gpt.gpt_model",
    ]
    by_name: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name, module in by_name.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(by_name[parent], own, module)
    by_name["megatron.core"].__version__ = version
    by_name["megatron.core.models.gpt.gpt_model"].GPTModel = model
    return by_name


def install() -> None:
    """Put the stand-ins in the place of Megatron in this process."""
    sys.modules.update(modules())
