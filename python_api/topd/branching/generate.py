"""Windows of models that cannot branch: batches of left-padded prefixes through `model.generate`."""

from collections.abc import Callable

import torch
from torch import Tensor

from topd.branching.noise import Noise
from topd.models.decoder import Decoder
from topd.models.sampling import Sampling, bare_settings, batches, generated, perturbed, prefixes, until_end
from topd.models.split_logits import together


@torch.no_grad()
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    attended: Tensor,
    positions: Tensor,
    sampling: Sampling,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue the prefix before each position.

    Args:
        input_ids, attended: [B, T], the rollouts.
        positions: [m, 2] int64 (row, column), column >= 1, any order.
        noise: of these windows; None: the generator's.

    Returns:
        As `topd.branching.decode.decode`.
    """

    def perturb(_: Tensor, logits: Tensor) -> Tensor:
        """Perturb the logits, so that the most likely token is a sample of our generator's."""
        kept = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= sampling.vocab, -torch.inf)
        scores = perturbed(kept.to(torch.promote_types(kept.dtype, torch.float32)), sampling.temperature, sampling.generator)
        if decoder.output.shard is None:
            return scores
        return only(scores, together(decoder.output, scores.argmax(-1)))

    def with_noise(noise: Noise, windows: Tensor, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what leaves of the logits [M, V] the token alone that the noise chooses after these prompts [M, columns]."""

        def choose(tokens: Tensor, logits: Tensor) -> Tensor:
            kept = logits[:, : sampling.vocab].to(torch.promote_types(logits.dtype, torch.float32))
            drawn = noise.choose(kept / sampling.temperature, windows, tokens.shape[1] - columns)
            return only(logits, together(decoder.output, drawn))

        return choose

    def only(logits: Tensor, drawn: Tensor) -> Tensor:
        """Return logits [M, V] of these tokens alone."""
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn.unsqueeze(-1), 0.0)

    settings = bare_settings(sampling.horizon, sampling.ends, padding=0, do_sample=False)
    tokens = positions.new_zeros(positions.shape[0], sampling.horizon)
    for chosen in batches(positions, sampling.horizon):
        ids, mask = prefixes(input_ids, attended, positions[chosen])
        pick = perturb if noise is None else with_noise(noise, chosen, ids.shape[1])
        new = generated(decoder.model, ids, mask, settings, pick)
        tokens[chosen, : new.shape[1]] = new
    counted = until_end(tokens, sampling.ends)
    return tokens.masked_fill(~counted, 0), counted.sum(-1)
