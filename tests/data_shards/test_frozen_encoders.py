"""Encoders as a trainer uses them: numbers that a backward pass may keep, weights held in bf16, models shared among ranks."""

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from data_shards.derive.request import Precision
from data_shards.encoders.check import check_content
from data_shards.encoders.efficient_net import EfficientNetEncoder
from data_shards.encoders.image import ImageEncoder, image_encoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.index import ShardIndex
from tests.tiny_models import tiny_clip_text, tiny_clip_vision, tiny_tokenizer, tiny_vae
from tests.tiny_priors import movq
from trainer.models import kandinsky, wuerstchen

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a person of blue hair"]
IMAGES = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 256).to(torch.uint8)
KINDS = ("vae", "movq", "clip_text", "projected", "t5", "vision", "effnet")

Encoder = LatentEncoder | TextEncoder | ImageEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_vae(root / "vae")
    movq().save_pretrained(root / "movq")
    tiny_clip_text(root / "clip_text")
    tiny_clip_text(root / "projected", projects=True)
    tiny_clip_vision(root / "vision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(root / "t5")
        torch.save(EfficientNetEncoder().state_dict(), root / "effnet.pt")
    tiny_tokenizer().save_pretrained(root / "t5")
    return root


class OnDevice(Tensor):
    """Images as on a CUDA device: numpy takes neither them nor views of them before they are on the CPU."""

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, dtype: object = None) -> NoReturn:
        self.numpy()

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """A plain tensor of the same numbers."""
        return self.as_subclass(Tensor)

    def to(self, *args: object, **settings: object) -> Tensor:
        """As `cpu`: the encoders here are there."""
        return self.as_subclass(Tensor).to(*args, **settings)  # type: ignore[call-overload]


def load(models: Path, kind: str, *, precision: Precision, holds_bf16: bool = False) -> Encoder:
    path = str(models / kind)
    match kind:
        case "vae" | "movq":
            return LatentEncoder(path, precision=precision, device=CPU, holds_bf16=holds_bf16)
        case "vision" | "effnet":
            return image_encoder(f"{path}.pt" if kind == "effnet" else path, precision=precision, device=CPU, holds_bf16=holds_bf16)
        case _:
            return TextEncoder(path, layer="last", tokens=8, masks=True, precision=precision, device=CPU, holds_bf16=holds_bf16)


def encode(encoder: Encoder) -> list[Tensor]:
    if not isinstance(encoder, TextEncoder):
        return [encoder.encode(IMAGES)]
    text = encoder.encode(CAPTIONS)
    return [text.hidden, *([text.pooled] if text.pooled is not None else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_held_in_bf16_give_the_bits_that_autocast_gives_and_take_less(models: Path, kind: str) -> None:
    used, held = load(models, kind, precision="bf16"), load(models, kind, precision="bf16", holds_bf16=True)
    for one, other in zip(encode(used), encode(held), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    sizes = [sum(weight.numel() * weight.element_size() for weight in encoder.module.parameters()) for encoder in (used, held)]
    assert sizes[1] < 0.8 * sizes[0]
    norms = [weight for layer in held.module.modules() if isinstance(layer, nn.LayerNorm | nn.GroupNorm) for weight in layer.parameters()]
    assert all(weight.dtype == torch.float32 for weight in norms)


def test_weights_held_in_bf16_do_not_serve_fp32(models: Path) -> None:
    with pytest.raises(ValueError, match="weights held in bf16 do not serve precision fp32; run the encoder in bf16"):
        load(models, "vae", precision="fp32", holds_bf16=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_may_keep_what_encoders_give(models: Path, kind: str) -> None:
    for made in encode(load(models, kind, precision="fp32")):
        weight = torch.ones(made.shape[-1], requires_grad=True)
        (made * weight).sum().backward()  # refused for tensors of inference mode
        assert weight.grad is not None and not made.requires_grad


@pytest.mark.parametrize("kind", ["vae", "movq", "vision", "effnet"])
def test_images_that_are_on_a_device_are_encoded_as_those_on_the_cpu(models: Path, kind: str) -> None:
    encoder = load(models, kind, precision="fp32")
    assert not isinstance(encoder, TextEncoder)
    with pytest.raises(TypeError, match="convert cuda"):
        np.asarray(IMAGES.as_subclass(OnDevice)[0])
    assert torch.equal(encoder.encode(IMAGES.as_subclass(OnDevice)), encoder.encode(IMAGES))


@pytest.mark.parametrize("kind", ["clip_text", "projected", "t5", "vision", "effnet"])
def test_units_are_parts_of_the_module_that_holds_them_once(models: Path, kind: str) -> None:
    encoder = load(models, kind, precision="fp32")
    assert not isinstance(encoder, LatentEncoder)
    units: tuple[nn.Module, ...] = encoder.units()
    inside = {id(module) for module in encoder.module.modules()}
    weights = [id(weight) for unit in units for weight in unit.parameters()]
    assert len(units) >= 2 and all(id(unit) in inside for unit in units) and len(weights) == len(set(weights))


def test_what_is_done_to_the_module_is_done_to_the_encoder(models: Path) -> None:
    encoder = load(models, "vision", precision="fp32")
    (before,) = encode(encoder)
    with torch.no_grad():
        for weight in encoder.module.parameters():
            weight.zero_()
    (after,) = encode(encoder)
    assert before.abs().max() > 0 and after.abs().max() == 0


def index_of(**made: Encoder) -> ShardIndex:
    """Shards that hold what these encoders made."""
    notes = {f"{name}.npy": encoder.to_json() for name, encoder in made.items()}
    return ShardIndex(Path("shards"), None, {}, {}, {}, (), "0" * 64, derived=({"models": notes},))


def test_stored_numbers_serve_the_models_that_they_fit_and_no_other(models: Path) -> None:
    plain, projected, unmasked = (
        TextEncoder(str(models / name), layer="last", tokens=8, masks=masks, precision="fp32", device=CPU)
        for name, masks in (("clip_text", True), ("projected", True), ("clip_text", False))
    )
    vision, effnet, vq = (load(models, kind, precision="fp32") for kind in ("vision", "effnet", "movq"))
    serving = (
        (wuerstchen.STORED, index_of(text=plain, image=effnet)),
        (kandinsky.STORED_PRIOR, index_of(text=projected, image=vision)),
        (kandinsky.STORED_DECODER, index_of(latents=vq, image=vision)),
    )
    for stored, index in serving:
        for extension, wanted in stored.items():
            check_content(index, extension, wanted)
    with pytest.raises(
        ValueError, match=r"its text\.npy has content 'last_hidden_state, padding not masked', wanted 'last_hidden_state, pad"
    ):
        check_content(index_of(text=unmasked), "text.npy", wuerstchen.STORED["text.npy"])
    with pytest.raises(
        ValueError, match=r"its text\.npy has class 'CLIPTextModel', wanted 'CLIPTextModelWithProjection'; encode them again"
    ):
        check_content(index_of(text=plain), "text.npy", kandinsky.STORED_PRIOR["text.npy"])
    with pytest.raises(ValueError, match=r"its image\.npy has class 'CLIPVisionModelWithProjection', wanted 'EfficientNetEncoder'"):
        check_content(index_of(image=vision), "image.npy", wuerstchen.STORED["image.npy"])
    with pytest.raises(ValueError, match=r"holds no latents\.npy of an encoder; encode them again"):
        check_content(index_of(image=vision), "latents.npy", kandinsky.STORED_DECODER["latents.npy"])
