"""What may be chosen: layer groups, search spaces, assignments, sizes and budgets."""
