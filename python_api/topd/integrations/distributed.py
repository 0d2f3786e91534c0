"""Models that several processes share: run the loss where a model is whole, and read heads from checkpoints."""

from topd.models.inside import inside

__all__ = ["inside"]
