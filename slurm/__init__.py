"""Slurm files that come with halfstep; see README.md beside this file."""
