"""U-Nets of other programs, by their tensors' names and shapes, as stock diffusers pipelines."""
