"""The run directory: names and files of what a search leaves on disk."""
