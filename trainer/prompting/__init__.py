"""Pictures of prompts: which image comes from which seed, drawn by stock pipelines, divided over ranks and shown on a sheet."""
