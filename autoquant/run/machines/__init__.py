"""What a command takes of its machines: the processes that share it, and their memory."""
