"""Frozen models that are run over shards: where they come from, and what they make of images and captions."""
