"""topd::logprob_rows for Triton: kernels.py, what they leave each other (records.py), and the launches of a chunk."""
