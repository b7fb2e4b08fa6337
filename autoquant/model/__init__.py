"""The model in memory: loading it, and putting formats on its linears."""
