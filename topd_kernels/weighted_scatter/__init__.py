"""topd::weighted_scatter for Triton."""
