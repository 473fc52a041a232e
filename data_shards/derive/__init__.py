"""From shards to captioned or encoded shards, by frozen models on many ranks."""
