"""Diffusion mathematics: noise schedules, parameterizations and samplers."""
