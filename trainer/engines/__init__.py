"""Engines: one whole optimizer step on one or many ranks."""
