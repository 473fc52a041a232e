"""Tiny random models of Wuerstchen's and Kandinsky's shapes, made from their configs, and what their forward passes take."""

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny_models import tiny_tokenizer
from trainer.models.deprecated import PaellaVQModel, PriorTransformer, VQModel, WuerstchenDiffNeXt, WuerstchenPrior

WIDTH, TOKENS = 24, 16  # of tests.tiny_models' text and image encoders: projection, length


def wuerstchen_prior() -> WuerstchenPrior:
    """It divides by |1 - b|: random weights as large as usual would make that any number, so that rounding errors grow a thousandfold."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = WuerstchenPrior(c_in=16, c=32, c_cond=32, c_r=8, depth=2, nhead=2)
        with torch.no_grad():
            for weight in prior.out.parameters():
                weight.mul_(0.1)
    return prior


def wuerstchen_decoder() -> tuple[WuerstchenDiffNeXt, PaellaVQModel]:
    """What draws images from the prior's latents."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        decoder = WuerstchenDiffNeXt(
            c_in=4,
            c_out=4,
            c_r=8,
            c_cond=32,
            clip_embd=32,
            c_hidden=[8, 16],
            nhead=[-1, 2],
            blocks=[1, 1],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            effnet_embd=16,
        )
        return decoder.eval(), PaellaVQModel(levels=2, bottleneck_blocks=1, num_vq_embeddings=16, embed_dim=8, latent_channels=4).eval()


def kandinsky_prior() -> PriorTransformer:
    """With embeddings and statistics that a trained one has; diffusers begins with zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=TOKENS)
        with torch.no_grad():
            assert prior.prd_embedding is not None, "its config asks for one"
            for weight in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
                weight.normal_(std=0.1)
            prior.clip_std.uniform_(0.5, 1.0)
    return prior


def kandinsky_unet() -> UNet2DConditionModel:
    """Keys and values of the image embedding are added to each layer's own; half of the output is a variance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=8,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
        )


def movq() -> VQModel:
    """Kandinsky's autoencoder; its decoder's norms have 32 groups whatever the config says."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQModel(
            block_out_channels=(32, 32),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            num_vq_embeddings=12,
            norm_type="spatial",
        ).eval()


def clip_text(*, projects: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """As tests.tiny_models.tiny_clip_text writes it."""
    config = CLIPTextConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=WIDTH if projects else 32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def clip_vision() -> CLIPVisionModelWithProjection:
    """Kandinsky's image encoder."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=WIDTH
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(config).eval()


def text_mask(count: int) -> Tensor:
    """Captions of 3, 8, 13 ... tokens."""
    return (torch.arange(TOKENS) < 3 + 5 * torch.arange(count)[:, None]).long()


def normals(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tensor(value: object) -> Tensor:
    """What a pipeline gave, whose annotation names all that it could."""
    assert isinstance(value, Tensor)
    return value
