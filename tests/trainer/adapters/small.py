"""Models with the real class structure that adapters are tested on, and a pipeline made of them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny_models import tiny_tokenizer
from trainer.adapters.lora import adapter_parameters, add_lora
from trainer.rng import generator

M = TypeVar("M", bound=nn.Module)
WIDTH = 16


def small_unet(*, seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion's structure in 2 levels."""
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        ),
        seed,
    )


def small_text_encoder(*, seed: int = 1) -> CLIPTextModel:
    """CLIP's text encoder of 2 layers."""
    config = CLIPTextConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return _seeded(lambda: CLIPTextModel(config), seed)


def small_vae() -> AutoencoderKL:
    """An autoencoder that does not shrink."""
    return _seeded(lambda: AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8), 2)


def adapt(model: nn.Module, *, targets: tuple[str, ...], alpha: float = 4, dora: bool = False, rank: int = 4) -> None:
    """An adapter that has learnt something: no zeros in it."""
    add_lora(model, rank=rank, alpha=alpha, targets=targets, dora=dora, generator=generator(0, "adapter"))
    numbers = generator(1, "learnt")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=numbers)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * drawn)
            elif "lora_B" in name:
                parameter.copy_(0.3 * drawn)


def pipeline(unet: nn.Module, text_encoder: nn.Module) -> StableDiffusionPipeline:
    """A stock pipeline around a U-Net and a text encoder."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    made = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=text_encoder,  # pyright: ignore[reportArgumentType]
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        unet=unet,  # pyright: ignore[reportArgumentType]
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def drawn(made: StableDiffusionPipeline) -> Tensor:
    """Two steps of a pipeline, as pixels in [0, 1]."""
    images = made("a red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt", height=8, width=8)
    return images.images  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def unet_input() -> Mapping[str, Tensor]:
    """Arguments of a U-Net's forward pass."""
    numbers = generator(5, "input")
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=numbers),
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, WIDTH, generator=numbers),
    }


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    """A U-Net's prediction for `unet_input`."""
    return unet(**unet_input()).sample


def _seeded(make: Callable[[], M], seed: int) -> M:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()
