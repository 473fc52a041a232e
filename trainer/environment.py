"""environment.json, the ranks' half: the devices that a run found, and what it chose to run on them."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.cuda import nccl

from data_shards import ranks
from data_shards.files import json_text, read_json_object, replace_file

_FILE = "environment.json"


def record_devices(run_dir: Path, *, attention: str, engine: Mapping[str, object], deterministic: bool) -> None:
    """Add this rank's device and what was chosen for it to RUN_DIR/environment.json; called by rank 0.

    engine: its settings as plain JSON values. What the launcher wrote stays; a chain's stage takes it from the chain's folder."""
    chosen = {"devices": [describe_device(ranks.device())], "attention": attention, "engine": dict(engine), "deterministic": deterministic}
    replace_file(run_dir / _FILE, json_text({**_launchers_half(run_dir), **chosen}))


def describe_device(device: torch.device) -> dict[str, object]:
    """Name of a device, how many of it this host has, and the versions of what drives it."""
    if device.type != "cuda":
        return {
            "kind": "cpu",
            "name": _processor_name(),
            "count": 1,
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else None,
    }


def _launchers_half(run_dir: Path) -> dict[str, object]:
    """What the launcher wrote for this attempt: in the run's folder, or for a stage in its chain's."""
    folder = run_dir.parent if (run_dir.parent / "chain.json").exists() else run_dir
    return read_json_object(folder / _FILE) if (folder / _FILE).exists() else {}


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's trade name; its architecture where Linux does not say one."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _driver_version(version: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """NVIDIA's driver, such as 570.86.15; None in a container that hides it."""
    words = version.read_text().splitlines()[0].split() if version.exists() else []
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)
