"""The search as an Optuna study: its space, its trials, and the journal that keeps them."""
