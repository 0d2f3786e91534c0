"""topd::logprob_rows for Triton."""
