"""Text sources, tokenization and the three disjoint token splits."""
