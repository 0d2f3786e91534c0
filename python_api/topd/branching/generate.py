"""Windows of models that cannot branch: batches of left-padded prefixes through `model.generate`."""

import torch
from torch import Tensor

from topd.models.decoder import Decoder
from topd.models.sampling import Sampling, bare_settings, batches, generated, perturbed, prefixes, until_end


@torch.no_grad()
def generate(
    decoder: Decoder, input_ids: Tensor, attended: Tensor, positions: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Continue the prefix before each position.

    Args:
        input_ids, attended: [B, T], the rollouts.
        positions: [m, 2] int64 (row, column), column >= 1, any order.

    Returns:
        As `topd.branching.decode.decode`.
    """

    def pick(_: Tensor, logits: Tensor) -> Tensor:
        """Perturb the logits, so that the most likely token is a sample of our generator's."""
        kept = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= sampling.vocab, -torch.inf)
        return perturbed(kept.to(torch.promote_types(kept.dtype, torch.float32)), sampling.temperature, sampling.generator)

    settings = bare_settings(sampling.horizon, sampling.ends, padding=0, do_sample=False)
    tokens = positions.new_zeros(positions.shape[0], sampling.horizon)
    for chosen in batches(positions, sampling.horizon):
        new = generated(decoder.model, *prefixes(input_ids, attended, positions[chosen]), settings, pick)
        tokens[chosen, : new.shape[1]] = new
    counted = until_end(tokens, sampling.ends)
    return tokens.masked_fill(~counted, 0), counted.sum(-1)
