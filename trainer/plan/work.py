"""What a network is made of and what it computes, from its shape alone: parameters by component, operations of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.plan.plan_input import PlanInput
from trainer.plan.traffic import Part


@final
@dataclass(frozen=True)
class Work:
    """A network's parameters and operations."""

    components: Mapping[str, tuple[int, int]]
    """Trained and frozen parameters of each part."""
    parts: tuple[Part, ...]
    forward_flops: int
    """Operations of one image's forward pass, 2 a multiply-add: convolutions, matrix products and attention."""
    backward_flops: int
    """Of its backward pass; less than twice the forward pass's where weights are frozen."""
    units: int = 1
    """Parts that a sharded engine gathers at a time."""

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(trained for trained, _ in self.components.values())

    @property
    def frozen(self) -> int:
        """Frozen parameters inside the trained network."""
        return sum(frozen for _, frozen in self.components.values())


def work_of(plan: PlanInput) -> Work:
    """Build the network on the meta device and count."""
    # Not on fake CPU tensors: their attention kernels hide their products from the counter.
    with torch.device("meta"):
        module = plan.build()
        trained, parts = _components(module), tuple(_part(parameter) for parameter in module.parameters())
        units = len(plan.units(module)) + 1
        module = module.float().train()
        inputs: list[object] = [torch.empty(1, *plan.shapes.x_t), torch.zeros(1)]
        if plan.shapes.cond is not None:
            inputs.append({name: torch.empty(1, *shape) for name, shape in plan.shapes.cond.items()})
        with FlopCounterMode(display=False) as counter:
            output = module(*inputs).sample
            forward = counter.get_total_flops()
            output.square().mean().backward()
            total = counter.get_total_flops()
    return Work(trained, parts, forward, total - forward, units)


def _part(parameter: Tensor) -> Part:
    return Part(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad)


def _components(module: nn.Module) -> Mapping[str, tuple[int, int]]:
    """By the module's own parts; of a network that is one stock model, that model's class is the only part."""
    children = dict(module.named_children())
    held = {id(parameter) for child in children.values() for parameter in child.parameters()}
    whole = any(id(parameter) not in held for parameter in module.parameters()) or len(children) > _MANY
    named = {type(module).__name__: module} if whole else children
    return {name: (_count(part, trained=True), _count(part, trained=False)) for name, part in named.items() if _count(part)}


_MANY = 4
"""A network of more parts than these is one stock model, such as a U-Net, whose blocks say nothing to anybody."""


def _count(module: nn.Module, *, trained: bool | None = None) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if trained in (None, parameter.requires_grad))
