"""topd::linear_divergence: all of its Python."""
