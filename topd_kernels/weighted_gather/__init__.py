"""topd::weighted_gather for Triton."""
