"""The cluster file: where a recipe runs. Free of torch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from trainer.config_io import config_path, load_config
from trainer.config_sections import Count, CountOrZero, Positive, Section


class ClusterConfig(Section):
    """Machines, ranks on each, and what a rank may use."""

    kind: Literal["local"] = "local"
    """local: ranks on this machine, started by the command itself."""
    ranks_per_node: Count = 1
    """Ranks per machine."""
    threads_per_rank: Count = 1
    """Compute threads per rank; on CPU several ranks of one thread beat one rank of several."""
    max_restarts: CountOrZero = 0
    """How often a run that ended with 70 or 75 is started again by itself."""
    collective_timeout_seconds: Annotated[float, Positive] = 300.0
    """Longest wait for the other ranks in one collective operation."""


def load_cluster(name_or_path: str, overrides: Sequence[str]) -> ClusterConfig:
    """The cluster file of a shipped name or a path, with `KEY=VALUE` overrides.

    Raises: RecipeErrors listing every mistake; ValueError if there is no such file."""
    return load_config(ClusterConfig, config_path(name_or_path, folder="clusters"), overrides, prefix="cluster.")
