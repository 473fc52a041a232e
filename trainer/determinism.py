"""Kernels that give the same bits every time, where a run asks for them."""

import os

import torch

# The two values with which NVIDIA promises the same bits: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")


def use_deterministic_kernels() -> None:
    """Let PyTorch take only kernels without a race for the rest of this process; one that has no such kernel raises when it is called.

    Called before the first CUDA tensor: cuBLAS reads its workspace from the environment once. Attention stays fast: under this
    rule sdpa leaves out cuDNN's kernels and runs the backward pass of the others in a fixed order.
    Raises: RuntimeError if CUDA has been used already, ValueError if CUBLAS_WORKSPACE_CONFIG has another value."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace is None:
        # A device that is only chosen (set_device) has no cuBLAS handle yet; one with memory may have.
        used = torch.cuda.is_initialized() and any(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        if used:
            raise RuntimeError(
                "engine.deterministic=true comes too late: CUDA has been used in this process, and cuBLAS has chosen its workspace; "
                f"start the process with CUBLAS_WORKSPACE_CONFIG={_CUBLAS_WORKSPACES[0]}"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACES[0]
    elif workspace not in _CUBLAS_WORKSPACES:
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} in the environment, but engine.deterministic=true wants "
            f"{' or '.join(_CUBLAS_WORKSPACES)}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
