"""Which attention kernels a diffusers model uses."""

import torch
from diffusers.models.modeling_utils import ModelMixin


def use_attention(model: ModelMixin, attention: str) -> None:
    """Switch a model to `sdpa` (PyTorch's own, also the choice of `auto`) or `xformers`.

    Raises: ValueError if xformers is asked for where its kernels, which are CUDA's, cannot run."""
    if attention != "xformers":
        return
    if not torch.cuda.is_available():
        raise ValueError("engine.attention=xformers needs a CUDA device, and this rank has none; set engine.attention=auto")
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError) as error:
        raise ValueError(f"engine.attention=xformers: {error}; pip install 'halfstep[xformers]', or set engine.attention=auto") from error
