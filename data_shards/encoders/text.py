"""Captions to the hidden states of a frozen text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from data_shards.derive.request import Precision
from data_shards.encoders.files import find_model
from data_shards.encoders.precision import autocast, hold_in_bf16
from data_shards.files import read_json_object

_T5_TOKENS = 256  # T5 itself has no limit


@final
@dataclass(frozen=True)
class EncodedText:
    """hidden: of every token, padding too; pooled: of the whole caption; mask: which tokens are no padding; cut: was it too long."""

    hidden: Float[Tensor, "b k d"]
    pooled: Float[Tensor, "b p"] | None
    mask: Int[Tensor, "b k"]
    cut: list[bool]


@final
class TextEncoder:
    """CLIP's text encoder, with or without its projection, or T5's."""

    def __init__(
        self,
        text: str,
        *,
        layer: Literal["last", "penultimate"],
        tokens: int,
        masks: bool,
        precision: Precision,
        device: torch.device,
        holds_bf16: bool = False,
        part: Literal["text_encoder", "text_encoder_2"] = "text_encoder",
    ) -> None:
        """text: as find_model takes it, at the top or in `part`, its tokenizer beside it; tokens: 0 for the model's own number.

        masks: whether padding is hidden from the encoder; holds_bf16: see `hold_in_bf16`.
        Raises: ValueError if it is another kind of model."""
        self.files = find_model(text, part=part)
        self._precision: Precision = precision
        self._layer, self._masks, self._device = layer, masks, device
        config = read_json_object(self.files.folder / "config.json")
        architectures = config.get("architectures")
        match config.get("model_type"), architectures:
            case "clip_text_model", ["CLIPTextModelWithProjection"]:
                self._class = CLIPTextModelWithProjection
            case (("clip_text_model" | "clip"), _):
                self._class = CLIPTextModel
            case "t5", _:
                self._class = T5EncoderModel
            case found, _:
                raise ValueError(f"{self.files.name} is of type {found}; --text-encoder wants CLIP's text encoder or T5's")
        self._model = self._class.from_pretrained(
            self.files.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        if holds_bf16:
            hold_in_bf16(self._model, precision)
        self._model.to(device).eval()  # pyright: ignore[reportArgumentType] (transformers hides torch's signature)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self.files.beside(part.replace("text_encoder", "tokenizer")), local_files_only=True, trust_remote_code=False
        )
        limit = _T5_TOKENS if self._class is T5EncoderModel else int(self._model.config.get_text_config().max_position_embeddings)
        self._tokens = tokens or min(limit, self._tokenizer.model_max_length)

    @property
    def module(self) -> nn.Module:
        """The model itself, to be placed or shared among ranks; `encode` goes on using it."""
        return self._model

    def units(self) -> tuple[nn.Module, ...]:
        """Its layers, which a shared model gathers one after the other."""
        match self._model:
            case CLIPTextModelWithProjection():
                return tuple(self._model.text_model.encoder.layers)
            case CLIPTextModel():
                return tuple(self._model.encoder.layers)
            case T5EncoderModel():
                return tuple(self._model.encoder.block)

    def encode(self, captions: Sequence[str]) -> EncodedText:
        """All captions at one length."""
        lengths = [len(ids) for ids in self._tokenizer(list(captions), verbose=False).input_ids]
        padded = self._tokenizer(list(captions), padding="max_length", truncation=True, max_length=self._tokens, return_tensors="pt")
        mask = padded.attention_mask.to(self._device)
        with torch.no_grad(), autocast(self._device, self._precision):
            output = self._model(
                input_ids=padded.input_ids.to(self._device), attention_mask=mask if self._masks else None, output_hidden_states=True
            )
        hidden = output.last_hidden_state if self._layer == "last" else output.hidden_states[-2]
        pooled = {CLIPTextModel: "pooler_output", CLIPTextModelWithProjection: "text_embeds"}.get(self._class)
        return EncodedText(hidden, output[pooled] if pooled is not None else None, mask, [length > self._tokens for length in lengths])

    def to_json(self) -> dict[str, object]:
        """What a reader must know of the numbers."""
        content = "last_hidden_state" if self._layer == "last" else "hidden_states[-2], without the final norm"
        return {
            **self.files.to_json(),
            "class": self._class.__name__,
            "content": f"{content}, {'padding masked' if self._masks else 'padding not masked'}",
            "tokens": self._tokens,
        }
