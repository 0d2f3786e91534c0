"""The `topd` command, a file or a folder for each of its subcommands."""
