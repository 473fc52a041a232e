"""A rank's place among all ranks, in torch's standard variables."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Place:
    """A rank's place among all ranks, and where rank 0 listens."""

    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    master_address: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """Of the rank's environment."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }
