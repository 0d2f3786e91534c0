"""topd::scaled_rows for Triton."""
