"""Wuerstchen's semantic compressor, which diffusers does not have: EfficientNetV2-S, its weights named as torchvision names them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from data_shards.encoders.files import file_sha256, find_model, weight_files
from data_shards.weights_file import named_tensors, read_weights_file

LATENT_CHANNELS = 16
_STATE = "effnet_state_dict"  # in model_v2_stage_b.pt of dome272/wuerstchen
_NORM_EPS = 1e-3


@final
@dataclass(frozen=True)
class _Stage:
    """Blocks of one stage. Source: Tan & Le 2021, arXiv:2104.00298, table 4."""

    fused: bool
    expansion: int
    stride: int
    inputs: int
    outputs: int
    blocks: int


_STAGES = (
    _Stage(True, 1, 1, 24, 24, 2),
    _Stage(True, 4, 2, 24, 48, 4),
    _Stage(True, 4, 2, 48, 64, 4),
    _Stage(False, 4, 2, 64, 128, 6),
    _Stage(False, 6, 1, 128, 160, 9),
    _Stage(False, 6, 2, 160, 256, 15),
)
_FEATURES = 1280


@final
class EfficientNetEncoder(nn.Module):
    """Frozen: images, normalised as ImageNet's, to latents of 1/32 of their size.

    Source: Pernias et al. 2023, arXiv:2306.00637, section 3; the projection has no bias, as in its authors' code."""

    def __init__(self) -> None:
        super().__init__()
        stages = [
            nn.Sequential(
                *(
                    _Block(stage, stage.inputs if number == 0 else stage.outputs, stage.stride if number == 0 else 1)
                    for number in range(stage.blocks)
                )
            )
            for stage in _STAGES
        ]
        self.backbone = nn.Sequential(_conv(3, 24, 3, stride=2), *stages, _conv(256, _FEATURES, 1))
        self.mapper = nn.Sequential(nn.Conv2d(_FEATURES, LATENT_CHANNELS, 1, bias=False), nn.BatchNorm2d(LATENT_CHANNELS))
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 16 i j"]:
        """Latents before the prior's scale."""
        return self.mapper(self.backbone(images))


@final
class _Block(nn.Module):
    """MBConv, or its fused form."""

    def __init__(self, stage: _Stage, inputs: int, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        self.is_residual = stride == 1 and inputs == stage.outputs
        if stage.fused and stage.expansion == 1:
            parts = [_conv(inputs, stage.outputs, 3, stride=stride)]
        elif stage.fused:
            parts = [_conv(inputs, wide, 3, stride=stride), _conv(wide, stage.outputs, 1, activates=False)]
        else:
            parts = [
                _conv(inputs, wide, 1),
                _conv(wide, wide, 3, stride=stride, groups=wide),
                _Squeeze(wide, inputs // 4),
                _conv(wide, stage.outputs, 1, activates=False),
            ]
        self.block = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        return self.block(x) + x if self.is_residual else self.block(x)


@final
class _Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Each channel, weighed by what all of the image holds."""
        pooled = functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(pooled))


def _conv(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1, activates: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=_NORM_EPS), *([nn.SiLU()] if activates else []))


def load_efficient_net(text: str) -> tuple[EfficientNetEncoder, dict[str, object]]:
    """The encoder, and its name and sha256. text: the authors' .pt file, or a folder or Hub id with safetensors of an EfficientNetEncoder.

    Raises: ValueError if it holds other weights."""
    path = Path(text)
    if path.is_file():
        source: dict[str, object] = {"name": path.name, "commit": None, "sha256": file_sha256(path)}
        content = read_weights_file(path)
        weights = named_tensors(content.get(_STATE, content) if isinstance(content, Mapping) else content)
    else:
        files = find_model(text, part="image_encoder")
        source, weights = files.to_json(), {}
        for part in weight_files(files.folder):
            weights = {**weights, **load_file(part)}
    model = EfficientNetEncoder()
    wanted = model.state_dict()
    different = sorted(name for name in wanted.keys() | weights.keys() if name not in wanted or name not in weights)
    different += [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    if different:
        raise ValueError(f"{text}: {len(different)} weights are missing, strange or of another shape: {different[0]}; wanted {_STATE}")
    model.load_state_dict({name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()})
    return model, source
