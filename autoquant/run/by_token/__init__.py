"""What single tokens say: the worst of them, and those of each place in a sequence."""
