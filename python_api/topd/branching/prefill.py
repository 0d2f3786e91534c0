"""One forward over the rollouts: hidden states, and the keys and values that windows grow from."""

from dataclasses import dataclass

from torch import Tensor

from topd.branching.nodes import Nodes
from topd.models.decoder import Decoder, position_ids_of


@dataclass(frozen=True, eq=False)
class Prefill:
    """A model's pass over rollouts [B, T].

    Attributes:
        input_ids: [B, T] int64.
        hidden: [B, T, H], the state at each column, after the final norm.
        trunk: the rollouts' nodes.
        layers: keys and values [B, heads, T, d] of each layer, with gradients where the pass had them; None: no cache.
    """

    input_ids: Tensor
    hidden: Tensor
    trunk: Nodes
    layers: list[tuple[Tensor, Tensor]] | None

    @property
    def attended(self) -> Tensor:
        """Which tokens are attended, [B, T] bool."""
        return self.trunk.valid

    def constant(self) -> "Prefill":
        """Return the same pass without gradients; it shares storage."""
        layers = None if self.layers is None else [(keys.detach(), values.detach()) for keys, values in self.layers]
        return Prefill(self.input_ids, self.hidden.detach(), self.trunk, layers)


def prefill(decoder: Decoder, input_ids: Tensor, attended: Tensor, *, cache: bool) -> Prefill:
    """Read the rollouts, with gradients where they are enabled.

    Where there is no token the model reads one, whose states are dropped: gradients of 0 reach it, and in a data-parallel step
    every process communicates.

    Args:
        input_ids: [B, T] int64.
        attended: [B, T] bool.
        cache: keep keys and values of every column, also those that a sliding layer would drop.
    """
    trunk = Nodes.trunk(attended, position_ids_of(attended))
    if not input_ids.numel():
        one = input_ids.new_zeros(1, 1)
        hidden = prefill(decoder, one, one == 0, cache=False).hidden
        none = hidden[:, :0].reshape(*input_ids.shape, hidden.shape[-1])
        return Prefill(input_ids, none, trunk, [] if cache else None)
    kept = None
    if cache:
        from transformers import DynamicCache

        kept = DynamicCache()
    hidden = decoder.states(input_ids, attended.long(), trunk.position, kept)
    layers = None
    if kept is not None:
        layers = [(layer.keys, layer.values) for layer in kept.layers]
        if not layers or any(keys is None or keys.shape[-2] != input_ids.shape[1] for keys, _ in layers):
            name = type(decoder.model).__name__
            raise ValueError(f"model must fill the key-value cache that it is given, got one without all columns from {name}")
    return Prefill(input_ids, hidden, trunk, layers)
