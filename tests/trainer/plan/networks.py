"""Small networks that plans are made of: a text-conditioned U-Net trained whole or in part, and what else a plan asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from trainer.config import EngineConfig
from trainer.plan.plan_input import PlanInput, Shapes

SD_2_1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SMALL = {
    "block_out_channels": (64, 128),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


@final
class Latent(nn.Module):
    """A U-Net conditioned on text states, as latent models are."""

    def __init__(self, shape: dict[str, object]) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(sample_size=64, **shape)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> UNet2DOutput:
        """The U-Net's prediction."""
        return UNet2DOutput(sample=self.unet(x_t, timestep, encoder_hidden_states=cond["text"]).sample)


@final
@dataclass(frozen=True)
class Case:
    """A small run; kind: replicated, fsdp, or zero_1 to zero_3."""

    kind: str = "replicated"
    precision: str = "fp32"
    partly_frozen: bool = False
    activation_checkpointing: bool = False
    accumulation: int = 1

    def plan(self, ranks: int) -> PlanInput:
        """The run on so many ranks, on CPUs."""
        kind, _, stage = self.kind.partition("_")
        engine = EngineConfig.model_validate(
            {"kind": "deepspeed" if kind == "zero" else kind, "zero_stage": int(stage or 2), "precision": self.precision}
        )
        return latent_plan(
            SMALL,
            engine,
            ranks=ranks,
            side=32,
            micro_batch_size=2,
            accumulation=self.accumulation,
            partly_frozen=self.partly_frozen,
            activation_checkpointing=self.activation_checkpointing,
        )


def latent_plan(
    shape: dict[str, object],
    engine: EngineConfig,
    *,
    ranks: int,
    side: int,
    micro_batch_size: int,
    accumulation: int = 1,
    partly_frozen: bool = False,
    activation_checkpointing: bool = False,
    on_gpu: bool = False,
) -> PlanInput:
    """A latent model's run; side: of a latent."""

    def build() -> nn.Module:
        module = Latent(shape)
        if partly_frozen:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("attn" in name and "to_q" in name)
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return module

    return PlanInput(
        build=build,
        units=_units,
        enable_checkpointing=lambda module: cast(Latent, module).unet.enable_gradient_checkpointing(),
        shapes=Shapes((4, side, side), {"text": (77, int(cast(int, shape["cross_attention_dim"])))}),
        engine=engine,
        micro_batch_size=micro_batch_size,
        micro_batches=ranks * accumulation,
        world_size=ranks,
        ranks_per_node=8,
        on_gpu=on_gpu,
        activation_checkpointing=activation_checkpointing,
        steps=1000,
    )


def _units(module: nn.Module) -> Sequence[nn.Module]:
    unet = cast(Latent, module).unet
    return [*unet.down_blocks, cast(nn.Module, unet.mid_block), *unet.up_blocks]
