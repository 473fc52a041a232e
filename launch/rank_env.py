"""The environment of a rank: torch's standard variables and what keeps a machine's ranks out of each other's way."""

from collections.abc import Mapping


def rank_environment(
    inherited: Mapping[str, str],
    *,
    rank: int,
    local_rank: int,
    local_world_size: int,
    world_size: int,
    master_address: str,
    master_port: int,
    threads: int,
) -> dict[str, str]:
    """The inherited environment with rank `rank` of `world_size` in it; `threads` bounds every pool of compute threads."""
    return {
        **inherited,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": master_address,
        "MASTER_PORT": str(master_port),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
