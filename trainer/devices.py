"""`python -m trainer.devices`: what torch finds on this machine, as a JSON object for `halfstep doctor`."""

import json
import sys
from importlib.util import find_spec

import torch
from torch.cuda import nccl


def main() -> None:
    """Write the object to stdout."""
    sys.stdout.write(json.dumps(describe()) + "\n")


def describe() -> dict[str, object]:
    """Versions, GPUs, and why xformers' kernels do not run here (xformers_trouble; null where they do)."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if torch.cuda.is_available() else None,
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "xformers_trouble": _xformers_trouble(),
    }


def _gpu(number: int) -> dict[str, object]:
    found = torch.cuda.get_device_properties(number)
    return {"name": found.name, "memory_gib": round(found.total_memory / 2**30, 1), "capability": f"{found.major}.{found.minor}"}


def _xformers_trouble() -> str | None:
    if find_spec("xformers") is None:
        return "it is not installed"
    from data_shards.ranks import device
    from trainer.models.attention import xformers_trouble

    return xformers_trouble(device(), torch.float32, head_widths=(64,))


if __name__ == "__main__":
    main()
