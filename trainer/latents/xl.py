"""What Stable Diffusion XL needs beside the others: two text encoders, and the sizes that its U-Net is told."""

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from data_shards.encoders.files import ModelFiles
from data_shards.encoders.text import TextEncoder
from data_shards.files import read_json_object
from trainer.config import StableDiffusionConfig
from trainer.latents.base import find_part
from trainer.latents.networks import load_text_encoder
from trainer.latents.trained import load_tokenizer


def encode_xl(
    first: TextEncoder, second: TextEncoder, prompts: list[str], *, size: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """text, pooled and time_ids of prompts, for images of `size` (height, width) that were not cropped.

    Both encoders: their last layer but one. Source: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2."""
    one, two = first.encode(prompts), second.encode(prompts)
    assert two.pooled is not None, "the second encoder has a projection"
    hidden = torch.cat([one.hidden.float(), two.hidden.float()], dim=-1)
    return {"text": hidden, "pooled": two.pooled.float(), "time_ids": time_ids(len(prompts), size, device=device)}


def time_ids(count: int, size: tuple[int, int], *, device: torch.device | None = None) -> Float[Tensor, "b 6"]:
    """Original height and width, the crop's top and left, target height and width, all in pixels."""
    height, width = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device).repeat(count, 1)


def assemble_xl(
    model: StableDiffusionConfig,
    network: object,
    *,
    vae: nn.Module,
    text_encoders: tuple[object, object] | None,
    scheduler: SchedulerMixin,
    device: torch.device,
) -> StableDiffusionXLPipeline:
    """The stock pipeline around a U-Net, or what stands in for one. text_encoders: None for those of the base."""
    files = [find_part(model.base, part, revision=model.revision) for part in ("text_encoder", "text_encoder_2")]
    if text_encoders is None:
        second = CLIPTextModelWithProjection.from_pretrained(
            files[1].folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        text_encoders = (load_text_encoder(files[0].folder).to(device), second.to(device))  # pyright: ignore[reportArgumentType]
    return StableDiffusionXLPipeline(
        vae=vae,  # pyright: ignore[reportArgumentType]
        text_encoder=text_encoders[0],  # pyright: ignore[reportArgumentType]
        text_encoder_2=text_encoders[1],  # pyright: ignore[reportArgumentType]
        tokenizer=load_tokenizer(files[0].beside("tokenizer")),  # pyright: ignore[reportArgumentType]
        tokenizer_2=load_tokenizer(files[1].beside("tokenizer_2")),  # pyright: ignore[reportArgumentType]
        unet=network,  # pyright: ignore[reportArgumentType]
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=_zeros(files[0]),
        add_watermarker=False,
    )


def _zeros(files: ModelFiles) -> bool:
    """Whether the base's pipeline takes zeros for an empty negative prompt."""
    return bool(read_json_object(files.root / "model_index.json").get("force_zeros_for_empty_prompt", True))
