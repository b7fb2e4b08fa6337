"""`autoquant receipt`: what a checkpoint is and how far from its model, for anyone to check."""
