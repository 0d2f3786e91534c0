"""Branch decoding: many continuations of one rollout over one shared key-value cache.

windows.py is the public entry. The objectives use its stages: `prefill.prefill` (one pass over the rollouts),
`continuations.continue_from` (windows that grow from it), `replay.replay` (the states on them, with gradient).
"""
