"""What is summed up of inputs in BF16 on the calibration tokens."""
