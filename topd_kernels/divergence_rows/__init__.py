"""topd::divergence_rows for Triton."""
