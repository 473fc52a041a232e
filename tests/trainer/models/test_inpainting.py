"""Widening a text-to-image U-Net: nothing changes until it learns, and a stock inpainting pipeline takes it."""

from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, CLIPTextModel

from tests.tiny_models import tiny_clip_text
from trainer.masks import draw_mask, latent_mask
from trainer.models.inpainting import inpainting_input, masked_pixels, widen

# 128 and 512 pixels by a VAE that shrinks by 8.
LATENT_SIDES = {128: 16, 512: 64}


def tiny_unet(in_channels: int = 4) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        ).eval()


def tiny_vae_of_eight() -> AutoencoderKL:
    """Shrinks images by 8, as Stable Diffusion's does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=64,
        ).eval()


def inpainting_pipeline(unet: UNet2DConditionModel, folder: Path) -> StableDiffusionInpaintPipeline:
    tiny_clip_text(folder)
    return StableDiffusionInpaintPipeline(
        vae=tiny_vae_of_eight(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        tokenizer=BertTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),  # pyright: ignore[reportArgumentType]
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def drawn_inputs(batch: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, a mask, latents of the masked image, and text states."""
    stream = torch.Generator().manual_seed(0)
    mask = torch.stack([latent_mask(draw_mask("brush", (8 * side, 8 * side), stream)[None])[0] for _ in range(batch)])
    latents = torch.randn(2, batch, 4, side, side, generator=stream)
    return latents[0], mask, latents[1], torch.randn(batch, 5, 32, generator=stream)


@torch.no_grad()
def output(unet: UNet2DConditionModel, x_t: Tensor, text: Tensor) -> Tensor:
    timestep = torch.tensor([7.0, 999.0])[: len(x_t)]
    return unet(x_t, timestep, encoder_hidden_states=text, return_dict=False)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A widened U-Net in a stock inpainting pipeline's folder."""
    folder = tmp_path_factory.mktemp("widened")
    inpainting_pipeline(widen(tiny_unet()), tmp_path_factory.mktemp("text")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", LATENT_SIDES.values(), ids=LATENT_SIDES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_output_at_the_start_is_the_bases_bit_for_bit(batch: int, side: int, saved: Path) -> None:
    x_t, mask, masked, text = drawn_inputs(batch, side)
    reloaded = cast(UNet2DConditionModel, UNet2DConditionModel.from_pretrained(saved / "unet", local_files_only=True))
    # On one thread torch takes another convolution for one input of 9 channels than for one of 4 at 64 x 64, whose sums round elsewhere.
    with torch.backends.mkldnn.flags(enabled=batch > 1):
        wanted = output(tiny_unet(), x_t, text)
        for unet in (widen(tiny_unet()), reloaded):
            assert torch.equal(output(unet, inpainting_input(x_t, mask, masked), text), wanted)
            assert torch.equal(output(unet, inpainting_input(x_t, 1 - mask, 1e3 * masked), text), wanted), "whatever the mask"
    widened = output(reloaded, inpainting_input(x_t, mask, masked), text)
    torch.testing.assert_close(widened, output(tiny_unet(), x_t, text), rtol=1e-5, atol=1e-5)


def test_a_widened_unet_is_the_same_one_with_a_new_first_layer_that_learns() -> None:
    base = tiny_unet().requires_grad_(False)
    base.conv_in.requires_grad_(True)
    names = [name for name, _ in base.named_parameters()]
    bias = base.conv_in.bias
    unet = widen(base.bfloat16())
    assert unet is base and unet.config["in_channels"] == 9 and unet.conv_in.bias is bias
    assert [name for name, _ in unet.named_parameters()] == names
    weight = unet.conv_in.weight
    assert weight.shape == (8, 9, 3, 3) and weight.dtype == torch.bfloat16 and weight.requires_grad
    assert not weight[:, 4:].any() and torch.equal(weight[:, :4], tiny_unet().conv_in.weight.bfloat16())
    assert [name for name, parameter in unet.named_parameters() if parameter.requires_grad] == ["conv_in.weight", "conv_in.bias"]
    unet.float()
    x_t, mask, masked, text = drawn_inputs(1, 16)
    unet(inpainting_input(x_t, mask, masked), 3, encoder_hidden_states=text).sample.square().mean().backward()
    assert unet.conv_in.weight.grad is not None and bool(unet.conv_in.weight.grad[:, 4:].flatten(2).any(2).all())


def test_an_inpainting_base_is_left_alone_and_others_are_refused() -> None:
    nine = tiny_unet(9)
    first = nine.conv_in
    assert widen(nine) is nine and nine.conv_in is first
    with pytest.raises(ValueError, match=r"in_channels=5, wanted 4 \(text to image, to be widened\) or 9 \(inpainting\)"):
        widen(tiny_unet(5))


@pytest.mark.parametrize("pixels", LATENT_SIDES)
def test_a_stock_pipeline_draws_with_it_from_a_saved_folder(pixels: int, saved: Path) -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(saved, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (pixels, pixels), "teal")
    mask = Image.fromarray((draw_mask("ellipse", (pixels, pixels), torch.Generator().manual_seed(0))[0] * 255).byte().numpy())
    drawn = pipeline(
        "a face",
        image=picture,
        mask_image=mask,
        height=pixels,
        width=pixels,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    images = cast(Tensor, drawn.images)  # pyright: ignore[reportAttributeAccessIssue]
    assert images.shape == (1, 3, pixels, pixels) and bool(images.isfinite().all())


def test_masks_and_masked_images_are_those_of_the_stock_pipeline(saved: Path) -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(saved, local_files_only=True)
    stream = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (2, 3, 64, 48), generator=stream, dtype=torch.uint8)
    mask = torch.stack([draw_mask("brush", (64, 48), stream) for _ in range(2)])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in stored]
    drawings = [Image.fromarray((one[0] * 255).byte().numpy()) for one in mask]
    image = pipeline.image_processor.preprocess(pictures, height=64, width=48).float()
    condition = pipeline.mask_processor.preprocess(drawings, height=64, width=48)
    masked_image = image * (condition < 0.5)
    ours = masked_pixels(stored.float() / 127.5 - 1, mask)
    torch.testing.assert_close(ours, masked_image, rtol=0, atol=1e-6)
    assert torch.equal(mask, condition) and bool((ours[(mask == 1).expand_as(ours)] == 0).all())
    small, _ = pipeline.prepare_mask_latents(
        condition, masked_image, 2, 64, 48, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0), False
    )
    assert torch.equal(latent_mask(mask), small)
