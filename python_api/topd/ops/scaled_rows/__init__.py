"""topd::scaled_rows: all of its Python."""
