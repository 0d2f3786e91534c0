"""topd::score_tokens for Triton."""
