"""A search, a score and an export from settings to files: stages and the run directory."""
