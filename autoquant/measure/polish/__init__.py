"""The polish of one assignment: weights refitted, block by block, to what quantization changed."""
