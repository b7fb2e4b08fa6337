"""What the model does: forwards, calibration, sensitivities and KL."""
