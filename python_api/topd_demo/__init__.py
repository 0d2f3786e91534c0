"""`topd demo`: a real on-policy distillation, from a checkpoint to a report. A user of topd's public API."""
