"""A worker's exit codes, the only language between trainer and launchers; free of torch."""

DONE = 0
CRASH = 1
"""Anything that has no code of its own."""
BAD_INPUT = 64
"""A recipe, file or folder that cannot be used; 2 at the command line."""
DATA_BUDGET = 65
NUMERIC = 66
PEER_LOST = 70
IO_ERROR = 74
CALL_AGAIN = 75
"""Checkpoint committed, not done."""
INTERRUPTED = 130
