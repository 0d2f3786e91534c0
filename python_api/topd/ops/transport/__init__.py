"""topd::transport: all of its Python."""
