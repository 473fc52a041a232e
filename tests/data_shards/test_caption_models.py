"""Other models than BLIP describe images too, by transformers' automatic classes: BLIP-2, and one that is asked in a chat."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from data_shards.derive.caption import Captioner
from data_shards.derive.request import CaptionRequest
from tests.tiny_models import tiny_tokenizer

_PHOTOS = sorted((Path(__file__).parents[1] / "data").glob("*.jpg"))
_TEMPLATE = (
    "{% for message in messages %}person {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} a "
)
_SMALL: Mapping[str, object] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION: Mapping[str, object] = {**_SMALL, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
_ENDS: Mapping[str, object] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks on the CPU have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer_with_images() -> BertTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "bos_token": "[CLS]", "eos_token": "[SEP]"})
    return tokenizer


def tiny_blip_2(folder: Path) -> None:
    tokenizer = tokenizer_with_images()
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3}
    text |= {"word_embed_proj_dim": 32, "max_position_embeddings": 128, "vocab_size": len(tokenizer), **_ENDS}
    between = {**_SMALL, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)}
    config = Blip2Config(
        vision_config=dict(_VISION), qformer_config=between, text_config=text, num_query_tokens=4, image_token_index=len(tokenizer) - 1
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4).save_pretrained(folder)


def tiny_llava(folder: Path) -> None:
    tokenizer = tokenizer_with_images()
    text = {**_SMALL, **_ENDS, "vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_dict({**_VISION, "projection_dim": 16}),
        text_config=LlamaConfig.from_dict(text),
        image_token_index=len(tokenizer) - 1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=_TEMPLATE, num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "prompt", "begins"), [(tiny_blip_2, "a photo of", "a photo of"), (tiny_llava, "what is it", ""), (tiny_llava, "", "")]
)
def test_another_model_describes_each_image_by_itself(make: object, prompt: str, begins: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert callable(make)
        make(tmp_path / "model")
    asked = CaptionRequest(model=str(tmp_path / "model"), prompt=prompt, max_new_tokens=8, precision="fp32")
    captioner = Captioner(asked, device=torch.device("cpu"))
    images = [Image.open(path) for path in _PHOTOS]
    together = captioner.captions(images)
    assert together == [captioner.captions([image])[0] for image in images]
    assert len(set(together)) > 1, "captions tell images apart"
    for caption, is_cut in together:
        assert caption.startswith(begins) and is_cut
        assert "what is it" not in caption and "person a" not in caption, "an answer does not repeat its question"
