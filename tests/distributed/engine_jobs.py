"""What a pool's ranks do in tests of an engine's options: a few steps of a small U-Net, without data or files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from data_shards import ranks
from trainer.checkpoint import agree_on_pieces, agreed_checkpoint, load_state, named_shards
from trainer.config import EmaConfig, OptimConfig, TinyUNetConfig
from trainer.engines.deepspeed_zero import DeepSpeedZero
from trainer.engines.engine import Engine, LossPerImage
from trainer.engines.frozen import place_frozen
from trainer.engines.fsdp import FullySharded
from trainer.engines.replicated import Replicated
from trainer.manifest import Retention
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.dropout import use_logical_dropout
from trainer.models.network import network as as_function
from trainer.models.tiny_unet import Denoiser, build_tiny_unet, shard_units
from trainer.save import Saver

MICRO_BATCHES, IMAGES, SIDE = 4, 2, 16
# A large eps: where a gradient is rounding noise, as before a group norm, Adam would blow that up to whole steps.
OPTIM = OptimConfig(learning_rate=1e-3, eps=1e-5)
EMA = EmaConfig(decay=0.9, more_decays=(0.5,))


@dataclass(frozen=True)
class Options:
    """Of a network and its engine."""

    kind: str
    """replicated, fsdp, or zero_1 to zero_3."""
    precision: str = "fp32"
    memory_format: str = "contiguous"
    partly_frozen: bool = False
    activation_checkpointing: bool = False
    replicas: int = 1
    cpu_offload: bool = False
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"


def take_steps(options: dict[str, object], steps: int) -> dict[str, object]:
    """Losses and gradient norms of some steps, then what the raw and the averaged model draw, and the names in the state."""
    engine = build(Options(**options))  # type: ignore[arg-type]
    results = [engine.step(step, losses(step), learning_rate=1e-3, votes=[1.0], loss_limit=None) for step in range(steps)]
    x_t, timestep = torch.ones(1, 3, SIDE, SIDE), torch.tensor([500.0])
    raw = engine.raw()(x_t, timestep)
    with engine.averaged() as averaged:
        drawn = averaged(x_t, timestep)
    assert torch.equal(engine.raw()(x_t, timestep), raw), "the trained weights came back"
    return {
        "losses": [result.loss for result in results],
        "gradient_norms": [result.gradient_norm for result in results],
        "votes": results[-1].votes[0],
        "raw": raw.abs().mean().item(),
        "averaged": drawn.abs().mean().item(),
        "state": sorted({piece.tensor for piece in agree_on_pieces(engine.state())}),
    }


def go_on_from_a_checkpoint(options: dict[str, object], folder: str) -> dict[str, object]:
    """The steps after a checkpoint, once without a break and once by a new engine that has loaded it.

    `different`: tensors of this rank's state that are not, bit for bit, the same after both."""
    engine, fresh = (build(Options(**options)) for _ in range(2))  # type: ignore[arg-type]
    pieces = agree_on_pieces(engine.state())
    for step in range(3):
        engine.step(step, losses(step), learning_rate=1e-3, votes=[1.0], loss_limit=None)
    keep = Retention(keep_last=2, keep_every_steps=None, keep_best=0)
    saver = Saver(Path(folder), engine.state(), pieces, retention=keep, asynchronous=False, timeout_seconds=60.0)
    saver.start(3, {})
    saver.finish()
    checkpoint = agreed_checkpoint(Path(folder))
    assert checkpoint is not None
    load_state(checkpoint, fresh.state(), pieces)
    fresh.restored({})
    both = []
    for each in (engine, fresh):
        results = [each.step(step, losses(step), learning_rate=1e-3, votes=[1.0], loss_limit=None) for step in range(3, 6)]
        both.append([(result.loss, result.gradient_norm) for result in results])
    held, wanted = (
        {name: shard.packed.unpack() if shard.packed else shard.values for name, shard in named_shards(each.state()).items()}
        for each in (fresh, engine)
    )
    return {
        "undisturbed": both[0],
        "resumed": both[1],
        "different": [name for name, tensor in wanted.items() if not torch.equal(held[name], tensor)],
    }


def use_a_large_frozen_model() -> list[float]:
    """The outputs of a frozen model that is whole on every rank, and of one that the ranks share."""
    x_t, timestep = torch.ones(1, 3, SIDE, SIDE), torch.tensor([500.0])
    outputs = []
    for shard_above_gib in (1.0, 1e-9):
        model = network(Options("replicated"))
        frozen = place_frozen(model, shard_units(model), shard_above_gib=shard_above_gib)
        whole = sum(parameter.numel() for parameter in network(Options("replicated")).parameters())
        held = sum(_local(parameter).numel() for parameter in frozen.parameters())
        assert held == whole if shard_above_gib == 1.0 else held < 0.6 * whole, f"{held} of {whole} weights on rank {ranks.rank()}"
        with torch.no_grad():
            outputs.append(as_function(frozen)(x_t, timestep).abs().mean().item())
    return outputs


def build(options: Options) -> Engine:
    """The engine of some options around a network whose weights are the same each time."""
    module = network(options)
    optim = OPTIM.model_copy(update={"kind": options.optimizer})
    match options.kind:
        case "replicated":
            return Replicated(
                module,
                optim=optim,
                ema=EMA,
                precision=options.precision,
                memory_format=options.memory_format,
                micro_batches=MICRO_BATCHES,
            )
        case "fsdp":
            return FullySharded(
                module,
                shard_units(module),
                optim=optim,
                ema=EMA,
                precision=options.precision,
                memory_format=options.memory_format,
                micro_batches=MICRO_BATCHES,
                replicas=options.replicas,
                cpu_offload=options.cpu_offload,
            )
        case _:
            return DeepSpeedZero(
                module,
                stage=int(options.kind.removeprefix("zero_")),
                optim=optim,
                ema=EMA,
                precision=options.precision,
                memory_format=options.memory_format,
                micro_batches=MICRO_BATCHES,
                micro_batch_size=IMAGES,
                cpu_offload=options.cpu_offload,
            )


def network(options: Options) -> UNet2DModel:
    """A small U-Net with dropout; partly frozen, only its attention is trained."""
    torch.manual_seed(0)
    config = TinyUNetConfig(channels=(8, 16), attention=(False, True), attention_heads=2, norm_groups=4, dropout=0.1)
    module = build_tiny_unet(config, SIDE)
    use_logical_dropout(module)
    if options.partly_frozen:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("attentions" in name)
    if options.activation_checkpointing:
        enable_activation_checkpointing(module)
    return module


def losses(step: int) -> Iterator[LossPerImage]:
    """This rank's micro-batches of one step."""
    for index in ranks.share(MICRO_BATCHES):
        stream = torch.Generator().manual_seed(MICRO_BATCHES * step + index)
        x, timestep = torch.randn(IMAGES, 3, SIDE, SIDE, generator=stream), torch.rand(IMAGES, generator=stream) * 1000
        torch.manual_seed(MICRO_BATCHES * step + index)  # dropout

        def loss(model: Denoiser, x: Tensor = x, timestep: Tensor = timestep) -> Tensor:
            return (model(x, timestep).float() - x).square().mean(dim=(1, 2, 3))

        yield loss


def _local(parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
