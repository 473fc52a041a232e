"""CLIP score: how well images go with their prompts, as a CLIP model sees both."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig

from data_shards.encoders.files import find_model
from data_shards.files import read_json_object

_BATCH_SIZE = 32


@final
class ClipScore:
    """A frozen CLIP model with its tokenizer and image processor."""

    def __init__(self, model: str, *, device: torch.device) -> None:
        """model: a folder, or a Hub id with @REVISION if need be, such as openai/clip-vit-base-patch16.

        Raises: ValueError if it is none, another kind of model, or not safetensors."""
        self.files = find_model(model)
        found = read_json_object(self.files.folder / "config.json").get("model_type")
        if found != "clip":
            raise ValueError(f"{self.files.name} is of type {found}; a CLIP score wants a whole CLIP model, of text and images")
        self._model = CLIPModel.from_pretrained(
            self.files.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        self._model.to(device).eval()  # pyright: ignore[reportArgumentType] (transformers hides torch's signature)
        self._tokenizer = AutoTokenizer.from_pretrained(self.files.folder, local_files_only=True, trust_remote_code=False)
        # Pillow's, also where torchvision is installed: the numbers do not depend on what else a machine has.
        self._processor = CLIPImageProcessorPil.from_pretrained(self.files.folder, local_files_only=True)
        text = self._model.config.text_config
        assert isinstance(text, CLIPTextConfig), "a CLIP model has one"
        self._tokens = text.max_position_embeddings
        self._device = device

    def scores(self, images: UInt8[Tensor, "b h w c"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The score of each image against its own prompt, in 0 ... 100; fp32 on the CPU. Long prompts are cut at CLIP's length.

        Source: Hessel et al. 2021, arXiv:2104.08718, section 3, with the weight 100 in the place of 2.5."""
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        batches = [slice(first, first + _BATCH_SIZE) for first in range(0, len(images), _BATCH_SIZE)]
        return torch.cat([self._scores(images[batch], prompts[batch]) for batch in batches])

    @torch.inference_mode()
    def _scores(self, images: UInt8[Tensor, "b h w c"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        coloured = images.expand(-1, -1, -1, 3)
        pixels = self._processor(list(coloured.numpy()), return_tensors="pt")["pixel_values"]
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=self._tokens, return_tensors="pt")
        output = self._model(
            input_ids=tokens.input_ids.to(self._device),
            attention_mask=tokens.attention_mask.to(self._device),
            pixel_values=pixels.to(self._device),
        )
        return score(output.image_embeds, output.text_embeds).cpu()


def score(image_embeds: Float[Tensor, "b d"], text_embeds: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """100 * max(cos, 0) of each pair. Source: as ClipScore.scores."""
    return 100 * torch.nn.functional.cosine_similarity(image_embeds.float(), text_embeds.float()).clamp(min=0)


def mean_scores(scores: Float[Tensor, " b"], prompts: Sequence[str]) -> dict[str, float]:
    """The mean score of each prompt's images, in the order in which prompts first come."""
    numbers: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scores.tolist(), strict=True):
        numbers.setdefault(prompt, []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in numbers.items()}
