"""topd::topk_logprobs: all of its Python."""
