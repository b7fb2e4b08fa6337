"""What each layer group, alone in each choice, does to the output."""
