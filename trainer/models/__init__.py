"""Denoising networks and how a batch becomes their input."""
