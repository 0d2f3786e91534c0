"""What topd knows of transformers' models."""
