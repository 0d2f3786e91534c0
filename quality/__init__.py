"""Does it teach: measurements of what the methods do to students, by topd's public API alone."""
