"""Every refusal of bad input."""
