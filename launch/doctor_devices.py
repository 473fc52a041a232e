"""halfstep doctor: processor cores, GPUs and the libraries between them and torch."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from launch.findings import Finding, ask

_GROUP = "Devices"
_DRIVER = Path("/proc/driver/nvidia/version")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@final
@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory_gib: float


@final
@dataclass(frozen=True)
class Torch:
    """What `python -m trainer.devices` has found."""

    version: str
    cuda: str | None
    """The CUDA that torch was built for; None for a CPU build."""
    cudnn: str | None
    nccl: str | None
    gpus: tuple[Gpu, ...]
    xformers_trouble: str | None

    @classmethod
    def ask(cls, *, seconds: float) -> Self:
        """Import torch in a process of its own. Raises: RuntimeError saying why that fails."""
        return cls.read(ask([sys.executable, "-m", "trainer.devices"], seconds=seconds))

    @classmethod
    def read(cls, text: str) -> Self:
        """From its JSON."""
        fields = json.loads(text.splitlines()[-1])
        gpus = tuple(Gpu(gpu["name"], gpu["memory_gib"]) for gpu in fields["gpus"])
        cudnn = None if fields["cudnn"] is None else str(fields["cudnn"])
        return cls(fields["torch"], fields["cuda"], cudnn, fields["nccl"], gpus, fields["xformers_trouble"])


def cores() -> int:
    """Processor cores that this process may use: its affinity mask, and its container's share."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def processors() -> Finding:
    """The cores of this machine, and how many of them are ours."""
    usable, count = cores(), os.cpu_count() or 1
    found = f"{usable} cores" if usable == count else f"{usable} of {count} cores may be used here"
    return Finding(_GROUP, "processor", "ok", found)


def driver_version(text: str) -> str | None:
    """The driver's version in /proc/driver/nvidia/version; None without one."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else None


def devices(torch: Torch, variables: Mapping[str, str]) -> Iterator[Finding]:
    """GPUs, and whether xformers' kernels run on them."""
    driver = driver_version(_DRIVER.read_text()) if _DRIVER.exists() else None
    yield judge_gpus(torch, driver, hidden=variables.get("CUDA_VISIBLE_DEVICES"))
    if torch.cuda and torch.gpus:
        found = f"CUDA {torch.cuda}, cuDNN {torch.cudnn or 'none'}, NCCL {torch.nccl or 'none'}, driver {driver or 'not known'}"
        yield Finding(_GROUP, "CUDA", "ok", found)
    yield judge_xformers(torch)


def judge_gpus(torch: Torch, driver: str | None, *, hidden: str | None) -> Finding:
    """driver: the NVIDIA driver's version, None without one. hidden: CUDA_VISIBLE_DEVICES."""
    if torch.gpus:
        names = ", ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in torch.gpus)
        return Finding(_GROUP, "GPUs", "ok", f"{len(torch.gpus)}: {names}")
    if driver is None:
        return Finding(_GROUP, "GPUs", "absent", "none: ranks compute on the CPU")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(_GROUP, "GPUs", "warning", f"hidden by CUDA_VISIBLE_DEVICES={hidden}", "unset CUDA_VISIBLE_DEVICES")
    if torch.cuda is None:
        found, mend = (
            f"driver {driver} is there, but torch {torch.version} is a CPU build",
            "pip install torch from pytorch.org for your CUDA",
        )
    else:
        found = f"driver {driver} is there, but torch {torch.version} for CUDA {torch.cuda} finds no GPU"
        mend = "update the driver, or install a torch for an older CUDA (nvidia-smi shows the newest that the driver knows)"
    return Finding(_GROUP, "GPUs", "problem", found, mend)


def judge_xformers(torch: Torch) -> Finding:
    """Which attention kernels engine.attention=auto takes."""
    if torch.xformers_trouble is None:
        return Finding(_GROUP, "attention", "ok", "xformers' kernels run here: engine.attention=auto takes them")
    text = torch.xformers_trouble
    status = "absent" if "not installed" in text or not torch.gpus else "warning"
    return Finding(_GROUP, "attention", status, f"PyTorch's own (sdpa); of xformers: {text}")
