"""Every op in eager torch on full logits: the definition of the math, the truth in tests. A file for each op."""
