"""The nets whose features distances are made of: the project's own, Inception, CLIP and DINOv2, all read from this machine or the Hub."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, Dinov2Model, Dinov2WithRegistersModel

from data_shards.encoders.files import ModelFiles, find_model
from data_shards.files import read_json_object
from trainer.feature_net import LARGEST_PIXELS, classify
from trainer.hash import tensors_sha256
from trainer.quality.faces_net import NamedFeatureNet
from trainer.quality.inception import INCEPTION_PIXELS, load_inception
from trainer.quality.resize import Resize, resize

NetKind = Literal["faces", "inception", "clip", "dinov2"]
_DEPTHS = 4
"""Layers of a transformer that distances to the teacher are taken at, evenly over its depth, the last one among them."""
_READ_IMAGES = 64
_Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of red, green and blue, of pixels in 0 ... 1."""
# Of preprocessor_config.json where a folder has none: OpenAI's of CLIP, ImageNet's of DINOv2.
_CLIP_SCALE: _Scale = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET_SCALE: _Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DINOV2_PIXELS = 224


class ImageFeatures(Protocol):
    """A frozen net on this rank's device; images are uint8, features come back on the CPU in fp32."""

    @property
    def name(self) -> str:
        """What every number made with it carries: equal names, equal numbers."""
        ...

    @property
    def identity(self) -> str:
        """All that decides the numbers, with whole hashes; the key of what is cached."""
        ...

    @property
    def resize(self) -> str:
        """How images come to its size: method-pixels."""
        ...

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """A vector an image."""
        ...

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c n"], ...]:
        """Of a few images, at some depths, a vector of c channels at each of n places."""
        ...


@final
class FacesFeatures:
    """The project's own net, which reads attributes."""

    def __init__(self, net: NamedFeatureNet, device: torch.device) -> None:
        self.name = net.name
        self.identity = f"faces {net.weights_sha256}"
        self.resize = f"area-{LARGEST_PIXELS}"
        """Of larger images alone; smaller ones stay as they are."""
        self.trained = net.trained
        self._net, self._device = net.trained.net.to(device), device

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """64 features of about unit variance."""
        return _in_chunks(lambda few: self._net(few.to(self._device)), images, 500)

    def classify(self, features: Float[Tensor, "b d"]) -> Int64[Tensor, "b n"]:
        """For each image and attribute the number of the likeliest value."""
        return classify(self._net, features.to(self._device)).cpu()

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c n"], ...]:
        """Of the three convolutions."""
        with torch.inference_mode():
            return tuple(layer.flatten(2).cpu() for layer in self._net.layers(images.to(self._device)))


@final
class InceptionFeatures:
    """Inception of 2015, as Frechet inception distances are published with.

    Pixels are (x - 128) / 128 as in its graph; with the resize `bilinear` x / 127.5 - 1, as pytorch-fid has it."""

    def __init__(self, path: Path, method: Resize, device: torch.device) -> None:
        """Raises: ValueError if the file holds other weights."""
        self._net, self._device = load_inception(path), device
        self._method: Resize = method
        sha256 = tensors_sha256({name: tensor for name, tensor in self._net.state_dict().items() if tensor.is_floating_point()})
        self._net.to(device)
        self.resize = f"{method}-{INCEPTION_PIXELS}"
        self.name = f"inception-{sha256[:12]}-{self.resize}"
        self.identity = f"inception {sha256} {self.resize}"

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """2048 features after the last pooling."""
        return _in_chunks(lambda few: self._net(self._pixels(few)), images, _READ_IMAGES)

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c n"], ...]:
        """After both first poolings and the blocks Mixed_6e and Mixed_7c."""
        with torch.inference_mode():
            return tuple(layer.flatten(2).cpu() for layer in self._net.layers(self._pixels(images)))

    def _pixels(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
        values = images.to(self._device).float()
        if self._method == "bilinear":
            return 2 * resize(values / 255, INCEPTION_PIXELS, self._method) - 1
        return (resize(values, INCEPTION_PIXELS, self._method) - 128) / 128


@final
class TransformerFeatures:
    """CLIP's image embedding, or DINOv2's class token after the last norm, of a folder or Hub id with safetensors."""

    def __init__(self, kind: Literal["clip", "dinov2"], text: str, method: Resize, device: torch.device) -> None:
        """text: as data_shards.encoders.files.find_model takes it. Raises: ValueError if it is another kind of model."""
        files = find_model(text, part="image_encoder")
        self._net, default_pixels = _load_transformer(kind, files)
        self._net.to(device).eval().requires_grad_(False)
        self.kind, self._device = kind, device
        self._method: Resize = method
        scale, crop = _preprocessing(files, _CLIP_SCALE if kind == "clip" else _IMAGENET_SCALE)
        # CLIP's positions are of one size, DINOv2's are interpolated to the size of its preprocessing.
        self._pixels_a_side = default_pixels if kind == "clip" else crop or min(default_pixels, _DINOV2_PIXELS)
        self._mean, self._deviation = torch.tensor(scale, device=device)[:, :, None, None]
        self.resize = f"{method}-{self._pixels_a_side}"
        identity = hashlib.sha256(json.dumps([kind, files.sha256, scale]).encode()).hexdigest()
        self.name = f"{kind}-{identity[:12]}-{self.resize}"
        self.identity = f"{kind} {identity} {self.resize}"

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """CLIP's embedding as it is, of any length; DINOv2's class token."""
        field = "image_embeds" if self.kind == "clip" else "pooler_output"
        return _in_chunks(lambda few: self._net(pixel_values=self._pixels(few))[field], images, _READ_IMAGES)

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c n"], ...]:
        """All tokens after a quarter, a half, three quarters and all of the layers."""
        with torch.inference_mode():
            hidden = self._net(pixel_values=self._pixels(images), output_hidden_states=True)["hidden_states"]
        last = len(hidden) - 1  # the first one is what enters the first layer
        chosen = sorted({max(1, last * depth // _DEPTHS) for depth in range(1, _DEPTHS + 1)})
        return tuple(hidden[number].transpose(1, 2).cpu() for number in chosen)

    def _pixels(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 p p"]:
        values = resize(images.to(self._device).float() / 255, self._pixels_a_side, self._method).clamp(0, 1)
        return (values - self._mean) / self._deviation


def default_resize(kind: NetKind) -> Resize:
    """The method that a net's published numbers are made with."""
    return "bilinear-tf1" if kind == "inception" else "bicubic-antialias"


def net_kind(text: str) -> tuple[NetKind, str]:
    """Kind and place of KIND or KIND=WHERE.

    Raises: ValueError if there is no such kind, or a kind but faces stands alone."""
    kind, _, where = text.partition("=")
    match kind:
        case "faces":
            return kind, where
        case "inception" | "clip" | "dinov2" if where:
            return kind, where
    raise ValueError(
        f"--feature-net {text}: wanted faces, faces=SHARDS, inception=FILE (pt_inception-2015-12-05-6726825d.pth, or as safetensors), "
        "clip=DIR|ID or dinov2=DIR|ID"
    )


def _in_chunks(
    features: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b d"]], images: UInt8[Tensor, "b 3 h w"], chunk_images: int
) -> Float[Tensor, "b d"]:
    with torch.inference_mode():
        return torch.cat([features(few).float().cpu() for few in images.split(chunk_images)])


def _load_transformer(kind: Literal["clip", "dinov2"], files: ModelFiles) -> tuple[nn.Module, int]:
    """The model, and the side in pixels that its positions were trained on."""
    found = read_json_object(files.folder / "config.json").get("model_type")
    classes = {
        ("clip", "clip"): CLIPVisionModelWithProjection,
        ("clip", "clip_vision_model"): CLIPVisionModelWithProjection,
        ("dinov2", "dinov2"): Dinov2Model,
        ("dinov2", "dinov2_with_registers"): Dinov2WithRegistersModel,
    }
    chosen = classes.get((kind, str(found)))
    if chosen is None:
        raise ValueError(f"{files.name} is of type {found}; --feature-net {kind}= wants {'CLIP' if kind == 'clip' else 'DINOv2'}")
    model = chosen.from_pretrained(files.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    return model, int(model.config.image_size)


def _preprocessing(files: ModelFiles, default: _Scale) -> tuple[_Scale, int | None]:
    """Mean and deviation of pixels in 0 ... 1 and the side of the crop, as the folder's image processor has them."""
    folder = files.beside("image_processor", "feature_extractor")
    config: Mapping[str, object] = {}
    # the second one is how transformers 5 saves the image processor of a model of text and images
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            found = read_json_object(folder / name)
            inner = found if part is None else found.get(part)
            config = inner if isinstance(inner, Mapping) else {}
            break
    match config:
        case {"image_mean": [float(), float(), float()] as mean, "image_std": [float(), float(), float()] as deviation}:
            scale: _Scale = (tuple(mean), tuple(deviation))
        case _:
            scale = default
    match config.get("crop_size"):
        case {"height": int(side)} | int(side):
            return scale, side
        case _:
            return scale, None
