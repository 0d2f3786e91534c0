"""Branch decoding: many continuations of one rollout over one shared key-value cache."""
