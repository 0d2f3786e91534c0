"""The public losses of one token's distribution."""
