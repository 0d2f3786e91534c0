"""`topd demo`: a real on-policy distillation, from a checkpoint to a report."""
