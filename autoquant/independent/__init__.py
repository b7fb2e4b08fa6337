"""A checkpoint run by transformers' own model, with no code that scoring, export or verify use."""
