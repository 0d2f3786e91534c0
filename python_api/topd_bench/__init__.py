"""Benchmarks: time, memory and digits of topd beside the floor, eager code and other libraries. README.md has the commands."""
