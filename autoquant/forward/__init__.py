"""The one loop over the blocks of a model, and what goes through it."""
