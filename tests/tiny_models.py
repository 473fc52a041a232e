"""Tiny random models of the shapes that captioners and encoders have, made from their configs: no download, the same every time."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WORDS = re.findall(
    r"\w+", "a an the of with photo picture cartoon person cat cup face skin hair shirt blue red green brown black white background"
)
_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def tiny_tokenizer() -> BertTokenizer:
    """Words, and letters for all other words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *_LETTERS[1:], *(f"##{letter}" for letter in _LETTERS)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def tiny_blip(folder: Path, *, seed: int = 0) -> Path:
    """A BLIP of 55,000 weights with processor and tokenizer; wide enough random weights that captions differ between images."""
    tokenizer = tiny_tokenizer()
    both: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "initializer_range": 0.3,
    }
    text = {**both, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 96}
    text |= {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**both, "image_size": 32, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def tiny_vae(folder: Path) -> Path:
    """An AutoencoderKL of 4 latent channels that shrinks images by 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=32,
        )
    model.save_pretrained(folder)
    return folder


def tiny_clip_text(folder: Path, *, projects: bool = False) -> Path:
    """CLIP's text encoder, 16 tokens long, in a pipeline's folders text_encoder/ and tokenizer/."""
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)
    model.save_pretrained(folder / "text_encoder")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


def tiny_clip_vision(folder: Path) -> Path:
    """CLIP's image encoder with its projection, as Kandinsky's prior takes it."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=24
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(config)
    model.save_pretrained(folder / "image_encoder")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "image_processor")
    (folder / "model_index.json").write_text("{}")
    return folder
