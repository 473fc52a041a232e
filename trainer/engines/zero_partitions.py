"""Where DeepSpeed 0.19 keeps this rank's fp32 partitions: the one place that knows its private names."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_shards import ranks
from trainer.engines.local_state import Place

_LARGEST_BUCKET = 500_000_000
"""DeepSpeed's own default, 2 GB."""


class ZeroOptimizer(Protocol):
    """What we touch of DeepSpeedZeroOptimizer (stages 1 and 2) and DeepSpeedZeroOptimizer_Stage3."""

    _global_grad_norm: float | Tensor
    single_partition_of_fp32_groups: list[Tensor]
    fp32_partitioned_groups_flat: list[Tensor]
    fp16_groups: list[list[nn.Parameter]]
    grad_position: dict[int, tuple[int, int, int]]
    persistent_parameters: list[Any]

    def get_param_id(self, parameter: nn.Parameter) -> int: ...

    def update_lp_params(self) -> None: ...

    def _partition_all_parameters(self) -> None: ...

    def _reassign_or_swap_out_partitioned_parameters(self, group: int) -> None: ...


def bucket_elements(trained: int) -> int:
    """Gradient elements that DeepSpeed gathers before it reduces them: no more than there are, of which its default takes no note.

    trained: elements of all trained parameters."""
    return min(_LARGEST_BUCKET, max(trained, 1))


def partitions(zero: ZeroOptimizer, *, stage: int) -> list[Tensor]:
    """The flat fp32 buffers of this rank that the optimizer updates."""
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def places(module: nn.Module, zero: ZeroOptimizer, *, stage: int) -> dict[str, Place]:
    """Where this rank's part of each trained parameter lies in `partitions`."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = {name: (_place_3(parameter, zero) if stage == 3 else _place_1_2(parameter)) for name, parameter in trained.items()}
    return {name: place for name, place in found.items() if place is not None and place.count}


@torch.no_grad()
def publish(zero: ZeroOptimizer, *, stage: int) -> None:
    """Let the module compute with what the fp32 partitions hold now. Collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    # Small parameters stay whole on every rank between steps: they are given back and gathered anew, or they keep their old values.
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _place_1_2(parameter: Any) -> Place | None:
    """Stages 1 and 2 cut one flat buffer of all parameters into equal partitions, at any element."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(tuple(parameter.shape), inside.start, buffer=mapping.param_group_index, offset=partition.start, count=inside.numel)


def _place_3(parameter: Any, zero: ZeroOptimizer) -> Place:
    """Stage 3 cuts every parameter into equal parts, the last one filled up."""
    buffer, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(ranks.rank() * size, parameter.ds_numel)
    count = min(size, parameter.ds_numel - start)
    return Place(tuple(parameter.ds_shape), start, buffer=buffer, offset=offset, count=count)
