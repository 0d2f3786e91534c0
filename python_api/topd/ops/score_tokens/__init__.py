"""topd::score_tokens: all of its Python."""
