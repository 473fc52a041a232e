"""Frozen side models (teacher, VAE, text or image encoder): whole on every rank, or shared among the ranks where they are large."""

from collections.abc import Sequence

import torch
from torch import nn

from data_shards import ranks

_FURTHER_METHODS = ("encode", "decode")
"""How an autoencoder is called, beside its forward pass; FSDP2 gathers weights for the forward pass alone."""


def hold_weights_in(lower: torch.dtype, module: nn.Module) -> None:
    """Hold the weights of a frozen module's linear and convolution layers in the type that autocast will compute in.

    They are the same bits as autocast's own copies, which it would make anew in every forward pass of weights without gradient."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(lower)


def place_frozen(module: nn.Module, units: Sequence[nn.Module], *, shard_above_gib: float, lower: torch.dtype | None = None) -> nn.Module:
    """A frozen model on this rank's device, in evaluation mode; one above `shard_above_gib` is shared among the ranks.

    lower: the type that autocast will compute in, in which a model that is not shared holds its weights as hold_weights_in does.
    Every forward pass of a shared one is collective; each of `units` is gathered while it computes. It may serve any engine."""
    module = module.requires_grad_(False).eval().to(ranks.device())
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    if ranks.world_size() == 1 or size_bytes <= shard_above_gib * 2**30:
        if lower is not None:
            hold_weights_in(lower, module)
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device().type, (ranks.world_size(),))
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for name in _FURTHER_METHODS:
        if callable(getattr(module, name, None)):
            register_fsdp_forward_method(module, name)
    return module
