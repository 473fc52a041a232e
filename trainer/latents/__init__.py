"""Latent models: bases opened, adapted, fed and put back into pipelines."""
