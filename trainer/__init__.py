"""Training, distillation and evaluation of diffusion models."""
