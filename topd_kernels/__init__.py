"""Triton kernels of topd's ops, for CUDA and ROCm. Knows torch and triton only; `topd` imports it on first use of a GPU."""
