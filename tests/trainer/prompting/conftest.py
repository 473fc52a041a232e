"""Tiny pipelines: folders of Stable Diffusion, and Wuerstchen and Kandinsky built from configs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from trainer.models.deprecated import (
    DDPMWuerstchenScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PaellaVQModel,
    PriorTransformer,
    VQModel,
    WuerstchenDecoderPipeline,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
    WuerstchenPriorPipeline,
)
from trainer.tiny_models.make import make_tiny

M = TypeVar("M", bound=nn.Module)
WIDTH = 32
CPU = torch.device("cpu")
MakePair = Callable[[], tuple[DiffusionPipeline, DiffusionPipeline]]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, 64 px."""
    return make_tiny("stable_diffusion", tmp_path_factory.mktemp("tiny") / "text")


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion of 9 channels, 64 px."""
    return make_tiny("stable_diffusion_inpainting", tmp_path_factory.mktemp("tiny") / "inpainting")


@pytest.fixture(scope="session")
def loaded_text_pipeline(text_folder: Path) -> StableDiffusionPipeline:
    """Stable Diffusion as a user loads it; not to be changed."""
    return StableDiffusionPipeline.from_pretrained(text_folder)


@pytest.fixture
def text_pipeline(loaded_text_pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same for one test alone."""
    return StableDiffusionPipeline(**copy.deepcopy(loaded_text_pipeline.components), requires_safety_checker=False)


@pytest.fixture
def inpainting_pipeline(inpainting_folder: Path) -> StableDiffusionInpaintPipeline:
    """The inpainting one as a user loads it."""
    return StableDiffusionInpaintPipeline.from_pretrained(inpainting_folder)


@pytest.fixture
def xl_pipeline(tmp_path: Path) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, 64 px."""
    return StableDiffusionXLPipeline.from_pretrained(make_tiny("stable_diffusion_xl", tmp_path / "xl"))


@pytest.fixture
def picture() -> Image.Image:
    """A colourful image of 64 px."""
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def mask() -> Image.Image:
    """White in the middle."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    return mask


@pytest.fixture
def make_wuerstchen(text_pipeline: StableDiffusionPipeline) -> MakePair:
    """A function that makes Wuerstchen's prior and decoder, the same each time."""

    def make() -> tuple[DiffusionPipeline, DiffusionPipeline]:
        tokenizer = text_pipeline.tokenizer
        text = _seeded(lambda: CLIPTextModel(_text_config(tokenizer)))
        prior = _seeded(lambda: WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=16, depth=1, nhead=2))
        decoder = _seeded(
            lambda: WuerstchenDiffNeXt(
                c_in=4, c_out=4, c_r=16, patch_size=1, c_cond=WIDTH, c_hidden=[16, 16], nhead=[-1, 2], blocks=[1, 1],
                level_config=["CT", "CTA"], effnet_embd=4, inject_effnet=[True, True], clip_embd=WIDTH,
            )
        )  # fmt: skip
        vqgan = _seeded(lambda: PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=16, latent_channels=4, num_vq_embeddings=64))
        both = {"tokenizer": tokenizer, "text_encoder": text}
        return (
            WuerstchenPriorPipeline(**both, prior=prior, scheduler=DDPMWuerstchenScheduler()),
            WuerstchenDecoderPipeline(**both, decoder=decoder, scheduler=DDPMWuerstchenScheduler(), vqgan=vqgan),
        )

    return make


@pytest.fixture
def make_kandinsky(text_pipeline: StableDiffusionPipeline) -> MakePair:
    """A function that makes Kandinsky's prior and decoder, the same each time."""

    def make() -> tuple[DiffusionPipeline, DiffusionPipeline]:
        tokenizer = text_pipeline.tokenizer
        vision = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
            projection_dim=WIDTH,
        )  # fmt: skip
        prior = KandinskyV22PriorPipeline(
            prior=_seeded(lambda: PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=WIDTH)),
            image_encoder=_seeded(lambda: CLIPVisionModelWithProjection(vision)),
            text_encoder=_seeded(lambda: CLIPTextModelWithProjection(_text_config(tokenizer))),
            tokenizer=tokenizer,
            scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),  # pyright: ignore[reportArgumentType]
        )
        unet = _seeded(
            lambda: UNet2DConditionModel(
                in_channels=4, out_channels=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=WIDTH, cross_attention_dim=WIDTH,
                attention_head_dim=8, resnet_time_scale_shift="scale_shift", sample_size=8,
            )
        )  # fmt: skip
        movq = _seeded(
            lambda: VQModel(
                block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), latent_channels=4,
                up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), norm_num_groups=4, norm_type="spatial",
                num_vq_embeddings=16, vq_embed_dim=4, layers_per_block=1,
            )
        )  # fmt: skip
        return prior, KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"), movq=movq)

    return make


def _text_config(tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    first, last, padding = (int(str(number)) for number in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=first, eos_token_id=last, pad_token_id=padding,
    )  # fmt: skip


def _seeded(build: Callable[[], M]) -> M:
    """A random model whose outputs all depend on all inputs: what is zero at first is drawn too."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval()
