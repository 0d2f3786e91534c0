"""topd::divergence_rows for Triton: statistics.py, kernels.py and terms.py are the kernels, records.py what they leave each
other, launches.py runs them."""
