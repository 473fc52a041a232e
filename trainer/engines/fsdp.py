"""Weights, gradients, moments and averages shared among the ranks: PyTorch's FSDP2, one shard unit gathered at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data_shards import ranks
from trainer.config import EmaConfig, OptimConfig
from trainer.engines.engine import LossPerImage, State, StepResult
from trainer.engines.local_state import LocalState, Place
from trainer.engines.precision import autocast, evaluation, lower_type
from trainer.models.network import Network, in_format, network
from trainer.optim import build_optimizer
from trainer.spans import span


@final
class FullySharded:
    """Data parallelism on shards. Each rank holds rows of every parameter; gradients are reduced in fp32 after every micro-batch."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[nn.Module],
        *,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
        memory_format: str,
        micro_batches: int,
        replicas: int = 1,
        cpu_offload: bool = False,
        compile: bool = False,
    ) -> None:
        """units: parts of the module whose weights are gathered together, in the order of the forward pass; the rest is one more.

        replicas: copies of the shards (hybrid sharding); divides the number of ranks."""
        self.module, self.precision, self.micro_batches = module.to(ranks.device()).train(), precision, micro_batches
        self.replicas = replicas
        mesh = shard_mesh(replicas)
        # Weights travel in the precision that autocast would give them anyway; inputs stay as the loss made them.
        policy = MixedPrecisionPolicy(param_dtype=lower_type(precision), reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
        for unit in (*units, module):
            if compile:
                unit.compile()
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
        shard_group = mesh["shard"]
        held = {name: parameter for name, parameter in _trained(module) if _local(parameter).numel()}
        self.parameters = list(held.values())
        places = {name: _place(parameter, shard_group, buffer=number) for number, (name, parameter) in enumerate(held.items())}
        # Plain tensors that share the shards' memory: the optimizer's kernels need not know of the mesh.
        self.weights = [nn.Parameter(_local(parameter).view(-1)) for parameter in self.parameters]
        self.local = LocalState(
            self.weights, places, optimizer=build_optimizer(optim, self.weights), optim=optim, ema=ema, precision=precision
        )
        self.network = in_format(network(module), memory_format)

    def step(
        self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, votes: Sequence[float], loss_limit: float | None = None
    ) -> StepResult:
        """See Engine.step."""
        sums = torch.zeros(self.micro_batches + len(votes) + 1, device=ranks.device())
        # FSDP2 takes the mean over the ranks, the global batch's loss is the mean over all micro-batches.
        share = self.local.scale.value * ranks.world_size() / self.micro_batches
        for index, loss_per_image in zip(ranks.share(self.micro_batches), losses, strict=True):
            with span("forward"), autocast(self.precision):
                loss = loss_per_image(self.network).mean()
            with span("backward"):
                (loss * share).backward()
            sums[index] = loss.detach()
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            weight.grad = torch.zeros_like(weight) if parameter.grad is None else _local(parameter.grad).view(-1)
            parameter.grad = None
        sums[self.micro_batches : -1] = torch.tensor(votes)
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        with span("reduction"):
            sums[-1] = torch.stack(torch._foreach_norm(gradients)).square().sum() / self.replicas if gradients else 0.0
            ranks.all_reduce_sum(sums)
            *numbers, squared_norm = sums.tolist()
        loss_list, told = numbers[: self.micro_batches], numbers[self.micro_batches :]
        gradient_norm = squared_norm**0.5 / self.local.scale.value
        outcome = self.local.update(
            step, gradients, losses=loss_list, gradient_norm=gradient_norm, learning_rate=learning_rate, loss_limit=loss_limit
        )
        for weight in self.weights:
            weight.grad = None  # room for the next step's activations
        return StepResult(outcome, tuple(loss_list), gradient_norm, tuple(told))

    def state(self) -> State:
        """See Engine.state."""
        return self.local.shards()

    def restored(self, loss_scale: Mapping[str, float]) -> None:
        """See Engine.restored."""
        self.local.scale.restore(loss_scale)

    def loss_scale(self) -> Mapping[str, float]:
        """See Engine.loss_scale."""
        return self.local.scale.to_json()

    def raw(self) -> Network:
        """See Engine.raw."""
        return evaluation(self.module, self.network, self.precision)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See Engine.averaged."""
        with self.local.averaged():
            yield self.raw()


def shard_mesh(replicas: int = 1) -> DeviceMesh:
    """All ranks as `replicas` rows whose ranks share one copy of the weights.

    Raises: ValueError if the rows would not be equal. Collective."""
    if ranks.world_size() % replicas:
        raise ValueError(f"engine.replicas={replicas} does not divide {ranks.world_size()} ranks; give a divisor")
    device = ranks.device().type
    if replicas == 1:
        return init_device_mesh(device, (ranks.world_size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, ranks.world_size() // replicas), mesh_dim_names=("replica", "shard"))


def _trained(module: nn.Module) -> Iterator[tuple[str, DTensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor), f"{name} was not sharded"
            yield name, parameter


def _place(parameter: DTensor, shard_group: DeviceMesh, *, buffer: int) -> Place:
    """Rows are dealt as torch.chunk deals them."""
    shape, rows = tuple(parameter.shape), parameter.shape[0]
    first = shard_group.get_local_rank() * -(-rows // shard_group.size())
    return Place(shape, first * (parameter.numel() // rows), buffer=buffer, offset=0, count=_local(parameter).numel())


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor), "FSDP2's parameters and gradients are DTensors"
    return tensor.to_local().detach()
