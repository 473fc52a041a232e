"""Tiny models that are no pipelines: CLIP and BLIP, each with its processor."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
)

from trainer.models.from_config import build_image_processor
from trainer.tiny_models.shapes import CLIP_SIDE, WIDTH, tiny_architecture
from trainer.tiny_models.vocabulary import build_tokenizer, caption_words, write_tokenizer

_WIDE_RANGE = 0.3
"""Of random weights: with it captions differ between images."""


def write_clip(folder: Path, *, seed: int, vocabulary: str) -> None:
    """CLIPModel with the encoders of Kandinsky's shape, tokenizer and image processor."""
    shape = tiny_architecture("kandinsky22_prior").components
    tokenizer = build_tokenizer(shape["tokenizer"], vocabulary)
    text = {**shape["text_encoder"].config, "vocab_size": len(tokenizer)}
    config = CLIPConfig(text_config=text, vision_config=dict(shape["image_encoder"].config), projection_dim=WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    CLIPProcessor(build_image_processor(shape["image_processor"]), tokenizer).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)


def write_blip(folder: Path, *, seed: int) -> None:
    """BLIP with processor and a tokenizer of words, and of letters for all other words."""
    tokenizer = _word_tokenizer()
    both: dict[str, object] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "initializer_range": _WIDE_RANGE,
    }
    text = {**both, "vocab_size": len(tokenizer), "encoder_hidden_size": WIDTH, "max_position_embeddings": 96}
    text |= {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**both, "image_size": CLIP_SIDE, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16, initializer_range=_WIDE_RANGE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": CLIP_SIDE, "width": CLIP_SIDE}), tokenizer).save_pretrained(folder)


def _word_tokenizer() -> BertTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = sorted({*caption_words(), *letters})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
