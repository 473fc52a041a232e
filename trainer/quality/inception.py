"""The Inception network of Frechet inception distances, which differs from the published one, with the names of its usual weights file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data_shards.weights_file import named_tensors, read_weights_file

INCEPTION_PIXELS = 299
INCEPTION_FEATURES = 2048
_NORM_EPS = 1e-3
_UNUSED = ("fc.", "AuxLogits.")
"""Of the file: the classifiers, which no distance needs."""
Pool = Literal["average", "largest", "halving"]


@final
@dataclass(frozen=True)
class _Conv:
    """A convolution with its name in a block; kernel is (height, width)."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


@final
@dataclass(frozen=True)
class _Branch:
    """Convolutions after one another; `ends` all take the last one's output, side by side."""

    convs: tuple[_Conv, ...]
    ends: tuple[_Conv, ...] = ()


@final
@dataclass(frozen=True)
class _Block:
    """Branches side by side, and a pooled one after them, which `pooled` channels are made of unless it halves the side.

    Source: Szegedy et al. 2016, arXiv:1512.00567, figures 5 to 10; its pools as in inception-2015-12-05's graph: an average counts no
    padding, and the last block takes the largest value where the paper averages."""

    inputs: int
    branches: tuple[_Branch, ...]
    pool: Pool
    pooled: int = 0


def _thin(inputs: int, pooled: int) -> _Block:
    """35 x 35 cells."""
    return _Block(
        inputs,
        (
            _Branch((_Conv("branch1x1", 64),)),
            _Branch((_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5)))),
            _Branch((_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3)))),
        ),
        "average",
        pooled,
    )


def _middle(width: int) -> _Block:
    """17 x 17 cells; 7 x 7 kernels as pairs of rows and columns."""
    row, column = (1, 7), (7, 1)
    return _Block(
        768,
        (
            _Branch((_Conv("branch1x1", 192),)),
            _Branch((_Conv("branch7x7_1", width), _Conv("branch7x7_2", width, row), _Conv("branch7x7_3", 192, column))),
            _Branch(
                (
                    _Conv("branch7x7dbl_1", width),
                    _Conv("branch7x7dbl_2", width, column),
                    _Conv("branch7x7dbl_3", width, row),
                    _Conv("branch7x7dbl_4", width, column),
                    _Conv("branch7x7dbl_5", 192, row),
                )
            ),
        ),
        "average",
        192,
    )


def _wide(inputs: int, pool: Pool) -> _Block:
    """8 x 8 cells."""
    return _Block(
        inputs,
        (
            _Branch((_Conv("branch1x1", 320),)),
            _Branch((_Conv("branch3x3_1", 384),), (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1)))),
            _Branch(
                (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3))),
                (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1))),
            ),
        ),
        pool,
        192,
    )


_BLOCKS = {
    "Mixed_5b": _thin(192, 32),
    "Mixed_5c": _thin(256, 64),
    "Mixed_5d": _thin(288, 64),
    "Mixed_6a": _Block(
        288,
        (
            _Branch((_Conv("branch3x3", 384, (3, 3), 2),)),
            _Branch((_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2))),
        ),
        "halving",
    ),
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
    "Mixed_7a": _Block(
        768,
        (
            _Branch((_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2))),
            _Branch(
                (
                    _Conv("branch7x7x3_1", 192),
                    _Conv("branch7x7x3_2", 192, (1, 7)),
                    _Conv("branch7x7x3_3", 192, (7, 1)),
                    _Conv("branch7x7x3_4", 192, (3, 3), 2),
                )
            ),
        ),
        "halving",
    ),
    "Mixed_7b": _wide(1280, "average"),
    "Mixed_7c": _wide(2048, "largest"),
}


@final
class Inception(nn.Module):
    """Pixels on the net's scale, about [-1, 1] at 299 x 299, to 2048 features; frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, _Conv("", 32, (3, 3), 2), padding=0)
        self.Conv2d_2a_3x3 = _Unit(32, _Conv("", 32, (3, 3)), padding=0)
        self.Conv2d_2b_3x3 = _Unit(32, _Conv("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = _Unit(64, _Conv("", 80))
        self.Conv2d_4a_3x3 = _Unit(80, _Conv("", 192, (3, 3)), padding=0)
        for name, block in _BLOCKS.items():
            self.add_module(name, _Mixed(block))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Float[Tensor, "b 3 299 299"]) -> Float[Tensor, "b 2048"]:
        """The mean over the cells of the last layer."""
        return self.layers(pixels)[-1].mean(dim=(2, 3))

    def layers(self, pixels: Float[Tensor, "b 3 299 299"]) -> tuple[Float[Tensor, "b c h w"], ...]:
        """What the four depths that distances are taken at give: 64, 192, 768 and 2048 channels."""
        first = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels))), 3, stride=2)
        hidden = second = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), 3, stride=2)
        kept = []
        for name in _BLOCKS:
            hidden = self.get_submodule(name)(hidden)
            if name in ("Mixed_6e", "Mixed_7c"):
                kept.append(hidden)
        return (first, second, *kept)


@final
class _Unit(nn.Module):
    """Convolution, batch norm, ReLU; padding: None keeps the side, or halves it without a border where the stride is 2."""

    def __init__(self, inputs: int, conv: _Conv, *, padding: int | None = None) -> None:
        super().__init__()
        border = (conv.kernel[0] // 2, conv.kernel[1] // 2) if padding is None and conv.stride == 1 else 0
        self.conv = nn.Conv2d(inputs, conv.outputs, conv.kernel, conv.stride, border, bias=False)
        self.bn = nn.BatchNorm2d(conv.outputs, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        return F.relu(self.bn(self.conv(x)))


@final
class _Mixed(nn.Module):
    """One inception block."""

    def __init__(self, block: _Block) -> None:
        super().__init__()
        self._block = block
        for branch in block.branches:
            inputs = block.inputs
            for conv in branch.convs:
                self.add_module(conv.name, _Unit(inputs, conv))
                inputs = conv.outputs
            for conv in branch.ends:
                self.add_module(conv.name, _Unit(inputs, conv))
        if block.pooled:
            self.branch_pool = _Unit(block.inputs, _Conv("branch_pool", block.pooled))

    def forward(self, x: Tensor) -> Tensor:
        """The branches' channels side by side, the pooled ones last."""
        outputs = []
        for branch in self._block.branches:
            hidden = x
            for conv in branch.convs:
                hidden = self.get_submodule(conv.name)(hidden)
            outputs += [self.get_submodule(conv.name)(hidden) for conv in branch.ends] or [hidden]
        match self._block.pool:
            case "average":
                outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
            case "largest":
                outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
            case "halving":
                outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, dim=1)


def load_inception(path: Path) -> Inception:
    """The net with the weights of pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity), or of the same as safetensors.

    Nothing is unpickled but tensors. Raises: ValueError if the file is not there, holds more than tensors, or other weights."""
    weights = {name: tensor for name, tensor in _read(path).items() if not name.startswith(_UNUSED)}
    with torch.device("meta"):  # no random numbers are drawn
        net = Inception()
    wanted = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    different = sorted(wanted.keys() ^ weights.keys())
    different += sorted(name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape)
    if different:
        raise ValueError(
            f"{path}: {len(different)} weights are missing, strange or of another shape, {different[0]} first; "
            "wanted pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or its tensors as safetensors"
        )
    counts = {name: torch.zeros((), dtype=torch.long) for name in net.state_dict() if name.endswith("num_batches_tracked")}
    net.load_state_dict({**{name: tensor.float() for name, tensor in weights.items()}, **counts}, assign=True)
    return net.eval().requires_grad_(False)


def _read(path: Path) -> Mapping[str, Tensor]:
    mend = "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or its tensors as safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {mend}")
    content = read_weights_file(path)
    tensors = named_tensors(content)
    if not isinstance(content, Mapping) or len(tensors) != len(content):
        raise ValueError(f"{path}: is no mapping of names to tensors; {mend}")
    return tensors
