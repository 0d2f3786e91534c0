"""topd::weighted_gather: all of its Python."""
