"""One module for each command, which defines the click command `command`."""
