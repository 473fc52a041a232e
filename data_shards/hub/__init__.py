"""The Hugging Face Hub: data sets as a source of rows, and shards pushed to it."""
