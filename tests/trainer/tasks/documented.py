"""What diffusers' own fine-tuning scripts compute, by stock parts and the documented formulas; nothing of the trainer.

Text to image: loss = E ||eps - eps_theta(x_t, t, c)||^2 or its v form, min-SNR weights (arXiv:2303.09556), offset noise; LoRA by peft.
DreamBooth: the loss of the subject's images plus prior_loss_weight times that of class images, in one batch that is chunked.
Inpainting: nine channels, the noisy latent, the mask and the latent of the masked image; the loss over the whole latent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(frozen=True)
class Settings:
    """The arguments of such a script."""

    lora: tuple[int, int] | None = None
    """Rank and alpha; None: all weights."""
    train_text_encoder: bool = False
    prior_weight: float | None = None
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch and its random numbers. images: uint8; with prior preservation the second half is of the class."""

    images: Tensor
    prompts: Sequence[str]
    noise: Tensor
    offsets: Tensor
    """[b c 1 1], standard normal."""
    posterior: Tensor
    timesteps: Tensor
    masks: Tensor | None = None
    """[b 1 h w] in pixels, 1: to be painted."""


class Documented:
    """One script's model and optimizer."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.settings = settings
        self.vae = AutoencoderKL.from_pretrained(base / "vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet")
        self.text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.noise_scheduler = cast(
            "DDPMScheduler", DDPMScheduler.from_pretrained(base / "scheduler", rescale_betas_zero_snr=settings.zero_terminal_snr)
        )
        if settings.lora is not None:
            rank, alpha = settings.lora
            self.unet.requires_grad_(False)
            self.unet.add_adapter(_lora(rank, alpha, UNET_TARGETS))
        if not settings.train_text_encoder or settings.lora is not None:
            self.text_encoder.requires_grad_(False)
        if settings.train_text_encoder and settings.lora is not None:
            rank, alpha = settings.lora
            self.text_encoder.add_adapter(_lora(rank, alpha, TEXT_TARGETS))
        self.unet.train()
        if settings.train_text_encoder:
            self.text_encoder.train()
        self.trained = {
            name: parameter
            for name, parameter in chain(_named("unet", self.unet), _named("text_encoder", self.text_encoder))
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=settings.weight_decay, eps=1e-8
        )

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the drawn first weights of a LoRA; all names must be there."""
        assert weights.keys() == self.trained.keys(), sorted(weights.keys() ^ self.trained.keys())
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def step(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """One optimizer step over accumulated micro-batches; the mean loss and the gradient's norm."""
        total = 0.0
        for batch in batches:
            loss = self.loss(batch)
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm.item()

    def loss(self, batch: Batch) -> Tensor:
        """Of one micro-batch."""
        settings, scheduler = self.settings, self.noise_scheduler
        pixels = (batch.images.float() / 255 - 0.5) / 0.5
        latents = self._latents(pixels, batch.posterior)
        noise = batch.noise + settings.noise_offset * batch.offsets if settings.noise_offset else batch.noise
        noisy = scheduler.add_noise(latents, noise, batch.timesteps)  # pyright: ignore[reportArgumentType]
        if batch.masks is not None:
            masked = self._latents(pixels * (batch.masks < 0.5), batch.posterior)
            noisy = torch.cat([noisy, F.interpolate(batch.masks, size=noisy.shape[2:]), masked], dim=1)
        tokens = self.tokenizer(
            list(batch.prompts), max_length=self.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        states = self.text_encoder(tokens.input_ids, return_dict=False)[0]
        predicted = self.unet(noisy, batch.timesteps, states, return_dict=False)[0]
        match scheduler.config["prediction_type"]:
            case "epsilon":
                target = noise
            case "v_prediction":
                target = scheduler.get_velocity(latents, noise, batch.timesteps)  # pyright: ignore[reportArgumentType]
            case other:
                raise AssertionError(other)
        if settings.prior_weight is not None:
            predicted, predicted_prior = predicted.chunk(2, dim=0)
            target, target_prior = target.chunk(2, dim=0)
            prior = F.mse_loss(predicted_prior.float(), target_prior.float(), reduction="mean")
            return F.mse_loss(predicted.float(), target.float(), reduction="mean") + settings.prior_weight * prior
        if settings.snr_gamma is None:
            return F.mse_loss(predicted.float(), target.float(), reduction="mean")
        snr = self._snr(batch.timesteps)
        weights = snr.clamp(max=settings.snr_gamma) / (snr + 1 if scheduler.config["prediction_type"] == "v_prediction" else snr)
        return (F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3)) * weights).mean()

    @torch.no_grad()
    def _latents(self, pixels: Tensor, normal: Tensor) -> Tensor:
        distribution = self.vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        return (distribution.mean + distribution.std * normal) * self.vae.config["scaling_factor"]

    def _snr(self, timesteps: Tensor) -> Tensor:
        """alpha^2 / sigma^2. Source: Hang et al. 2023, arXiv:2303.09556, section 3.1."""
        alpha_bar = self.noise_scheduler.alphas_cumprod[timesteps]
        return alpha_bar / (1 - alpha_bar)


def _lora(rank: int, alpha: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)


def _named(prefix: str, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}", parameter) for name, parameter in model.named_parameters()]
