"""topd::transport for Triton."""
