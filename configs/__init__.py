"""Recipes (what) and clusters (where) that come with halfstep."""
