"""Methods, a file each: rollouts in, a loss, metrics and scores out."""
