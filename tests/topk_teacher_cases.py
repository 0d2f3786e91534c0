"""Batches with a teacher's top-k, as a server sends them."""

import torch

K = 5


@torch.no_grad()
def own_logprobs(model, ids, mask, temperature=1.0):
    """Return [B, T, V]: column t is the distribution of the token in column t; -inf where there is none."""
    logprobs = torch.full((*ids.shape, model.config.vocab_size), -torch.inf, dtype=model.dtype)
    for row in range(ids.shape[0]):
        columns = mask[row].nonzero()[:, 0]
        logits = model(ids[row, columns].unsqueeze(0)).logits[0, :-1] / temperature
        logprobs[row, columns[1:]] = logits.log_softmax(-1)
    return logprobs


def with_topk(batch, teacher, k=K, temperature=1.0):
    """Return the batch of a server that answers for every attended token, padded by one entry."""
    logprobs, ids = own_logprobs(teacher, batch["input_ids"], batch["attention_mask"], temperature).topk(k, dim=-1)
    logprobs = torch.nn.functional.pad(logprobs, (0, 1), value=-torch.inf)
    return batch | {"teacher_topk_logprobs": logprobs, "teacher_topk_ids": torch.nn.functional.pad(ids, (0, 1), value=-100)}
