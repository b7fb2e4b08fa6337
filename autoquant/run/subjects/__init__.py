"""What is measured without a search: assignments, checkpoints and finished runs, opened."""
