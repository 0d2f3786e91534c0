"""Does it teach: measurements of what the methods do to students."""
