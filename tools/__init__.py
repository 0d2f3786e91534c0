"""Verification tools: kernels compiled ahead of time, watched runs, a static account."""
