"""Checks of arguments that several functions share. A rule of one function alone stands beside that function."""
