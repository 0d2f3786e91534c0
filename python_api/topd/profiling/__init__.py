"""What a training loop spends: time by stage, memory, waits, of the calls of an objective inside a block."""
