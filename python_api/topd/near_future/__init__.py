"""The near future: transport between continuations, guidance, and which tokens are looked at."""
