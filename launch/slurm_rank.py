"""One srun task as a rank: Slurm's variables become torch's, then the worker runs in this process."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.logs import rank_log
from launch.network import rank_interface
from launch.place import Place


def main() -> None:
    """`python -m launch.slurm_rank KIND PATH OPTIONS`, under srun."""
    place = place_of(os.environ)
    os.environ.update(place.variables())
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = rank_interface(place.master_address, os.environ.get("HALFSTEP_INTERFACE"))
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    run_dir = Path(sys.argv[2])
    if place.rank > 0 and run_dir.is_dir():
        log = rank_log(run_dir, place.rank)
        os.dup2(log, 1)
        os.dup2(log, 2)
    from launch.worker import main as work

    work()


def place_of(variables: Mapping[str, str]) -> Place:
    """A task's place from SLURM_* and what the job's batch step has chosen.

    Raises: ValueError naming the variable that is missing."""
    try:
        return Place(
            rank=int(variables["SLURM_PROCID"]),
            local_rank=int(variables["SLURM_LOCALID"]),
            local_world_size=tasks_of_node(variables["SLURM_STEP_TASKS_PER_NODE"], int(variables["SLURM_NODEID"])),
            world_size=int(variables["SLURM_NTASKS"]),
            master_address=variables["HALFSTEP_MASTER_ADDRESS"],
            master_port=int(variables["HALFSTEP_MASTER_PORT"]),
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set: this command is started by srun inside a halfstep job") from None


def tasks_of_node(counts: str, node: int) -> int:
    """Tasks of node number `node` in Slurm's notation: 4(x2),3 is 4, 4, 3."""
    every: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        every += [int(count)] * int(times or 1)
    return every[node]


if __name__ == "__main__":
    main()
