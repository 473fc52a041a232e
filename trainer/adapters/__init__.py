"""What is added to a model that stays as it is: low-rank adapters and new tokens, with the files that they come in."""
