"""Small random models with the structure of well-known bases, for tests and for trying a recipe without a download."""
