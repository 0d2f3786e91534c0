"""`topd demo`: a real on-policy distillation, from a checkpoint to a report.

It uses topd's public API, and starts in command.py.
"""
