"""topd::linear_logprobs: all of its Python."""
