"""Training objectives: functions of a denoiser, clean images and randomness that return a loss per image."""
