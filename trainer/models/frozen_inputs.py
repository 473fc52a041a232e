"""What frozen encoders say of a micro-batch: made now, or taken from its shards where no encoder is given."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data_shards.encoders.image import ImageEncoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.reading.sample import MicroBatch

TextState = Literal["text", "pooled", "text_mask"]


def image_states(batch: MicroBatch, encoder: ImageEncoder | None, *, device: torch.device) -> Float[Tensor, "b *shape"]:
    """What the encoder makes of the images, or image.npy of the shards where it is None; fp32, as the encoder scales it.

    Raises: ValueError if there is neither."""
    return _stored_or_made(batch, encoder, "image.npy", "--image-encoder", device)


def latents(batch: MicroBatch, encoder: LatentEncoder | None, *, device: torch.device) -> Float[Tensor, "b c i j"]:
    """What the encoder makes of the images, or latents.npy of the shards where it is None; fp32, before any scaling or sampling.

    Raises: ValueError if there is neither."""
    return _stored_or_made(batch, encoder, "latents.npy", "--vae", device)


def text_states(batch: MicroBatch, encoder: TextEncoder | None, names: Sequence[TextState], *, device: torch.device) -> dict[str, Tensor]:
    """text: hidden states of every token; pooled: of the whole caption; text_mask: 1 where a token is no padding. fp32, mask int64.

    A sample without a caption counts as one with an empty caption.
    Raises: ValueError if the shards do not hold all of them and there is no encoder, or it has no pooled state."""
    if encoder is None:
        missing = [f"{name}.npy" for name in names if f"{name}.npy" not in batch.tensors]
        if missing:
            option = {"pooled.npy": " --pooled", "text_mask.npy": " --text-mask"}.get(missing[0], "")
            raise ValueError(_nothing(missing[0], f"--text-encoder MODEL{option}"))
        stored = {name: batch.tensors[f"{name}.npy"] for name in names}
    else:
        made = encoder.encode([caption or "" for caption in batch.captions])
        if made.pooled is None and "pooled" in names:
            raise ValueError(f"{encoder.files.name} has no pooled text state; name CLIP's text encoder with its projection")
        every = {"text": made.hidden, "pooled": made.pooled, "text_mask": made.mask}
        stored = {name: value for name in names if (value := every[name]) is not None}
    return {name: value.to(device, torch.int64 if name == "text_mask" else torch.float32) for name, value in stored.items()}


def _stored_or_made(
    batch: MicroBatch, encoder: ImageEncoder | LatentEncoder | None, name: str, option: str, device: torch.device
) -> Tensor:
    if encoder is not None:
        return encoder.encode(batch.images).to(device, torch.float32)
    if name not in batch.tensors:
        raise ValueError(_nothing(name, f"{option} MODEL"))
    return batch.tensors[name].to(device, torch.float32)


def _nothing(name: str, option: str) -> str:
    return (
        f"the shards hold no {name}, and no encoder is given to make it; encode them (halfstep shards encode {option}), or name the model"
    )
