"""What stands in stock pipelines for the networks that an engine trains."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import final

import torch
from torch import Tensor

from trainer.latents.trained import Trained
from trainer.models.inpainting import INPAINTING_CHANNELS
from trainer.models.kandinsky import KandinskyDecoderDenoiser, KandinskyPriorDenoiser
from trainer.models.network import Network
from trainer.models.stable_diffusion import StableDiffusionDenoiser
from trainer.models.wuerstchen import WuerstchenPriorDenoiser
from trainer.prompting.engine_stand_in import (
    EngineStandIn,
    stand_in_for_inpainting_unet,
    stand_in_for_kandinsky_decoder,
    stand_in_for_kandinsky_prior,
    stand_in_for_unet,
    stand_in_for_wuerstchen_prior,
)
from trainer.prompting.pictures import Tick


@final
class TextStandIn:
    """A pipeline's text encoder that hands the tokens on: the one that is trained is called with the U-Net, as its engine wants it."""

    def __init__(self) -> None:
        self.config = SimpleNamespace()
        self.dtype = torch.float32

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """Tokens as numbers of width 1, which pipelines carry along like any other states."""
        return (ids.unsqueeze(-1).float(),)


def stand_in(
    trained: Trained, network: Network, *, device: torch.device, tick: Tick, unscaled: Callable[[Tensor], Tensor] | None = None
) -> EngineStandIn:
    """For the U-Net or prior of the family's stock pipeline; calls the engine's network. Collective where that is.

    unscaled: of Kandinsky's prior, whose own statistics an engine may have sharded: embeddings back to CLIP's scale."""
    network = _of_fp32(network)
    match trained.module:
        case StableDiffusionDenoiser() as module:
            predict = network if module.text_encoder is None else _with_tokens(network)
            if module.unet.config["in_channels"] == INPAINTING_CHANNELS:
                return stand_in_for_inpainting_unet(module.unet, predict, device=device, tick=tick)
            return stand_in_for_unet(module.unet, predict, device=device, tick=tick)
        case WuerstchenPriorDenoiser() as module:
            return stand_in_for_wuerstchen_prior(module.prior, network, device=device, tick=tick)
        case KandinskyPriorDenoiser() as module:
            return stand_in_for_kandinsky_prior(module.prior, network, device=device, tick=tick, post_process_latents=unscaled)
        case KandinskyDecoderDenoiser() as module:
            return stand_in_for_kandinsky_decoder(module.unet, network, device=device, tick=tick)
        case other:
            raise ValueError(f"{type(other).__name__} is no latent denoiser")


def _of_fp32(network: Network) -> Network:
    """The network told its conditioning in fp32, whatever the precision of the frozen encoders that made it."""

    def predict(x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return network(x_t, timestep, {name: value.float() if value.is_floating_point() else value for name, value in cond.items()})

    return predict


def _with_tokens(network: Network) -> Network:
    """The network with a text encoder of its own, called with what TextStandIn has handed on."""

    def predict(x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        others = {name: value for name, value in cond.items() if name != "text"}
        return network(x_t, timestep, {**others, "input_ids": cond["text"].squeeze(-1).round().long()})

    return predict
