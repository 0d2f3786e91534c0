"""topd::weighted_scatter: all of its Python."""
