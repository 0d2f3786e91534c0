"""A GPTModel of the installed Megatron on CPU ranks, with topd's output processor and with its own logits; started by
test_megatron.py.

Megatron asks for the current CUDA device and its random state in its attention, and its norm in plain torch refuses sequence
parallelism: the three have stand-ins here.
"""

import inspect
from contextlib import nullcontext

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.distributed.nn.functional import all_gather
from two_ranks import fork

import topd
from topd.integrations.megatron import DistillationContext, output_processor

V, PADDED, S, B, H = 37, 40, 8, 2, 16


def norm(_cls, config, hidden_size, eps=1e-5, **_others):
    return torch.nn.LayerNorm(hidden_size, eps)


def model_of(ranks, sequence_parallel):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    layers = get_gpt_layer_local_spec()
    return GPTModel(config, layers, vocab_size=PADDED, max_sequence_length=S, share_embeddings_and_output_weights=True)


def work(rank):
    torch.cuda.current_device = lambda: "cpu"
    get_cuda_rng_tracker().fork = nullcontext
    WrappedTorchNorm.__new__ = norm
    torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    cases = {"plain": compared(rank, ranks, False)} | ({"sequence": compared(rank, ranks, True)} if ranks > 1 else {})
    forward = [(name, one.kind.name) for name, one in inspect.signature(GPTModel.forward).parameters.items()]
    return {"cases": cases, "forward": forward, "loaded": megatron.core.__version__}


def compared(rank, ranks, sequence_parallel):
    """Return this rank's losses and gradients, and those of the model's own logits."""
    group = parallel_state.get_tensor_model_parallel_group()
    model, draw = model_of(ranks, sequence_parallel), torch.Generator().manual_seed(5)
    ids = torch.randint(V, (B, S), generator=draw)
    inputs = (ids, torch.arange(S).expand(B, S), torch.ones(B, 1, S, S).triu(1).bool())
    teacher_hidden, weight = torch.randn(S, B, 6, generator=draw), torch.randn(PADDED, 6, generator=draw)
    labels, loss_mask = ids.roll(-1, 1), torch.ones(B, S)
    loss_mask[:, -1] = 0.0

    rows = PADDED // ranks
    shard = None if ranks == 1 else topd.VocabShard(group, rank * rows, V)
    teacher = topd.Head(weight[:V] if shard is None else weight[rank * rows :][:rows].clone(), shard=shard)
    context = DistillationContext(teacher_hidden, teacher, vocab=V)
    calls = {"output_processor": output_processor, "output_processor_context": context}
    value = model(*inputs, labels=labels, loss_mask=loss_mask, **calls)
    (value * loss_mask).sum().backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    logits = torch.cat(all_gather(model(*inputs, labels=None)), dim=-1) if ranks > 1 else model(*inputs, labels=None)
    student = logits[..., :V].double().log_softmax(-1)
    other = (teacher_hidden.double() @ weight[:V].double().T).log_softmax(-1).transpose(0, 1)
    true = (student.exp() * (student - other)).sum(-1) * loss_mask
    (true.sum() / ranks).backward()  # the gather adds up what each rank sends back
    return {
        "value": value.detach(),
        "true_value": true.detach(),
        "grads": grads,
        "true_grads": {name: one.grad for name, one in model.named_parameters()},
    }


if __name__ == "__main__":
    fork(work)
