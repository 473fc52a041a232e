"""How good drawn images are: feature nets, distances of sets of images, and what else an evaluation measures."""
