"""One optimizer step of the real engine on tensors without memory, rank 0 of any number of ranks, with every live byte counted."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives collectives a meaning on fake tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.engines.fsdp import FullySharded
from trainer.engines.local_state import LocalState
from trainer.engines.replicated import Replicated
from trainer.models.network import Network
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import PlanInput
from trainer.plan.zero_layout import ZeroLayout

_STATE = ("weights", "frozen", "gradients", "moments", "averages")


@final
@dataclass(frozen=True)
class Measured:
    """Bytes of live tensors on one rank."""

    state: dict[str, int]
    """What stays from step to step, by kind: weights, frozen (weights inside the trained network), gradients, moments, averages."""
    peak: int
    """Largest sum during the step."""
    at_peak: dict[str, int]
    """The peak by kind: those of the state, gathered and cast (copies of weights), sent (collectives' buffers), activations, other."""
    build_peak: int
    """Largest sum while the engine was built around the network."""


def measure(plan: PlanInput) -> Measured:
    """Build the engine and take a step, as rank 0, which holds at least as much as any other.

    With accumulation two micro-batches are computed: the second meets the gradients of the first, and further ones are like it.
    Raises: ValueError if ranks do not divide as the engine needs."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_ranks(plan.world_size), LiveBytes(counted=_is_fake, kinds=_kinds) as live, _Answers(), _as_on(gpu=plan.on_gpu):
        with fake:
            module = _built(plan)
        engine, build_peak = _engine(plan, module, live, fake)
        live.restart_peak()
        state = {kind: size for kind, size in live.tally.now.items() if kind in _STATE}
        with fake:
            batch = _batch(plan)
            losses = (_loss(batch, live) for _ in range(min(2, plan.accumulation)))
            engine.step(0, losses, learning_rate=1e-4, votes=(0.0,), loss_limit=None)
        measured = Measured(state, live.tally.peak, {k: v for k, v in live.tally.at_peak.items() if v}, build_peak)
        del engine, module, losses
        gc.collect()
    return measured


def kept_activations(plan: PlanInput, *, checkpointing: bool) -> int:
    """Bytes of the activations that one micro-batch's forward pass keeps for its backward pass; weights and their copies do not count."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.engine.precision]
    with fake, LiveBytes(counted=_is_fake, kinds=_kinds) as live, _Answers(), _as_on(gpu=plan.on_gpu):
        module = plan.build().train()
        if checkpointing:
            plan.enable_checkpointing(module)
        live.label("weights", module.parameters())
        batch = _batch(plan)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), _saved(live):
            output = module(*batch).sample
        kept = live.tally.now.get("activations", 0)
        del output
    return kept


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """This process is rank 0 of a group whose other ranks do not exist and whose collectives do nothing."""
    assert not dist.is_initialized(), "a plan is made by a process that belongs to no group"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _built(plan: PlanInput) -> nn.Module:
    module = plan.build()
    if plan.activation_checkpointing:
        plan.enable_checkpointing(module)
    # It is where it is to be; fake parameters that are counted cannot be exchanged, as nn.Module.to would.
    module.to = lambda *_, **__: module  # type: ignore[method-assign]
    return module


def _engine(
    plan: PlanInput, module: nn.Module, live: LiveBytes, fake: FakeTensorMode
) -> tuple[Replicated | FullySharded | ZeroLayout, int]:
    """The engine with its state labelled, and the largest sum of bytes while it was built."""
    live.label("built", module.parameters())
    common = {"optim": plan.optim, "ema": plan.ema, "precision": plan.engine.precision, "memory_format": plan.memory_format}
    micro_batches = plan.world_size * min(2, plan.accumulation)
    match plan.engine.kind:
        case "replicated":
            with fake:
                engine = Replicated(module, micro_batches=micro_batches, **common)
            live.label("gradients", [engine.reduced])
            _label_state(live, engine.local)
        case "fsdp":
            # The mesh asks real tensors where this rank is, so this is not under the fake mode; the shards are fake as the weights are.
            engine = FullySharded(module, plan.units(module), micro_batches=micro_batches, replicas=plan.engine.replicas, **common)
            for weight in engine.weights:  # the shards of the gradient stay until the next step's take their place
                weight.grad = torch.zeros_like(weight)
            live.label("gradients", [weight.grad for weight in engine.weights if weight.grad is not None])
            _label_state(live, engine.local)
        case "deepspeed":
            with fake:
                engine = ZeroLayout(module, stage=plan.engine.zero_stage, live=live, on_gpu=plan.on_gpu, plan=plan)
    build_peak = live.tally.peak
    live.label("frozen", [parameter for parameter in module.parameters() if not parameter.requires_grad])
    return engine, build_peak


def _label_state(live: LiveBytes, local: LocalState) -> None:
    live.label("weights", local.weights)
    live.label("averages", [buffer for average in local.averages for buffer in average])
    live.label("moments", local.moments())


def _batch(plan: PlanInput) -> tuple[object, ...]:
    shapes, count = plan.shapes, plan.micro_batch_size
    x_t, timestep = torch.zeros(count, *shapes.x_t), torch.zeros(count)
    if plan.memory_format == "channels_last" and x_t.dim() == 4:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    if shapes.cond is None:
        return x_t, timestep
    return x_t, timestep, {name: torch.zeros(count, *shape) for name, shape in shapes.cond.items()}


def _loss(batch: tuple[object, ...], live: LiveBytes) -> Callable[[Network], Tensor]:
    def loss_per_image(network: Network) -> Tensor:
        with _saved(live):
            prediction = network(*batch)
        return (prediction.float() - torch.zeros_like(prediction, dtype=torch.float32)).square().flatten(1).mean(1)

    return loss_per_image


@contextmanager
def _saved(live: LiveBytes) -> Iterator[None]:
    """What forward saves for backward is labelled as activations, unless it is something else already."""

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor) and live.counted(tensor) and live.kind_of(tensor) == "other":
            live.label("activations", [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


_C10D = torch.ops.c10d


def _kinds(live: LiveBytes, operator: torch._ops.OpOverload, inputs: tuple, result: object) -> None:
    """Copies of weights in a lower precision, and what collectives send and receive."""
    if operator is torch.ops.aten._to_copy.default:
        if isinstance(result, Tensor) and _is_fake(inputs[0]) and live.kind_of(inputs[0]) in ("weights", "frozen"):
            live.label("cast", [result])
    elif operator is _C10D._allgather_base_.default:
        live.label("sent", inputs[:2])
    elif operator is _C10D._reduce_scatter_base_.default:
        live.label("gradients", inputs[:1])
        live.label("sent", inputs[1:2])


class _Answers(TorchFunctionMode):
    """Answers where fake tensors have none, and a short way where the long one would only cost time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.tolist and _is_fake(args[0]):
            return [0.0] * args[0].numel()
        if func in (Tensor.item, Tensor.__float__) and _is_fake(args[0]):
            return 0.0
        if func is torch.chunk and _is_fake(args[0]):
            return _first_chunk(args[0], args[1], kwargs.get("dim", 0))
        return func(*args, **kwargs)


def _first_chunk(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """What rank 0 looks at of a tensor that is cut for `count` ranks: the first part, which is also the size of a whole one.

    Cutting all 1,024 parts of SD 2.1's weights takes five minutes."""
    size = -(-tensor.shape[dim] // count)
    return [tensor.narrow(dim, 0, size)] * count


@contextmanager
def _as_on(*, gpu: bool) -> Iterator[None]:
    """Autocast as CUDA's: it normalises in fp32, where the CPU's stays in the lower type; so outputs and what is kept are larger.

    The functions are exchanged, because modes of torch functions are off in a backward pass, where checkpointing computes again.
    Source: PyTorch's documentation, "Automatic Mixed Precision package", Autocast Op Reference."""
    names = ("group_norm", "layer_norm", "softmax") if gpu else ()
    before = {name: getattr(functional, name) for name in names}
    for name, function in before.items():
        setattr(functional, name, _in_fp32(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def under_autocast(inputs: Tensor, *others: object, **named: object) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            inputs = inputs.float()
            others = tuple(value.float() if isinstance(value, Tensor) else value for value in others)
            named = {name: value.float() if isinstance(value, Tensor) else value for name, value in named.items()}
        return function(inputs, *others, **named)

    return under_autocast
