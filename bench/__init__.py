"""Benchmarks of topd beside its rivals: speed, memory, numerics. See README.md."""
