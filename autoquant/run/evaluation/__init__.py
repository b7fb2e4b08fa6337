"""`autoquant evaluate`: tasks on what a command names, and where their scores are kept."""
