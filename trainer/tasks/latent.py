"""Latent models: a base fine-tuned, or a small one trained from scratch, in the latents of a frozen autoencoder."""
