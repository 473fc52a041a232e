"""Shards: making them (faces, folders), checking them, and reading them in a pure order."""
