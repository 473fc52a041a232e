"""The U-Nets of pesser and of openai as plain functions of named tensors, written from their documented structure, without diffusers.

Structure: Ho et al. 2020, arXiv:2006.11239, appendix B; Nichol & Dhariwal 2021, arXiv:2102.09672, appendix A; Dhariwal & Nichol 2021,
arXiv:2105.05233, section 3; facts/diffusion.md 2.6."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS = 32


class Weights:
    """A checkpoint that grows: a tensor is drawn when its name is first asked for, and every further use must want the same shape."""

    def __init__(self, *, seed: int = 0, device: str = "cpu") -> None:
        self.tensors: dict[str, Tensor] = {}
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self._drawn(name, shape)
        assert self.tensors[name].shape == shape, name
        return self.tensors[name]

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._device == "meta":
            return torch.empty(shape, device="meta")
        normal = torch.randn(shape, generator=self._generator)
        if name.endswith("bias"):
            return 0.1 * normal
        return 1 + 0.1 * normal if len(shape) == 1 else normal / math.sqrt(math.prod(shape[1:]))


def conv(w: Weights, name: str, x: Tensor, channels: int, *, size: int = 3, stride: int = 1, padding: int = 1) -> Tensor:
    kernel, bias = w(f"{name}.weight", channels, x.shape[1], size, size), w(f"{name}.bias", channels)
    return F.conv2d(x, kernel, bias, stride=stride, padding=padding)


def linear(w: Weights, name: str, x: Tensor, width: int) -> Tensor:
    return F.linear(x, w(f"{name}.weight", width, x.shape[-1]), w(f"{name}.bias", width))


def normed(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, GROUPS, w(f"{name}.weight", x.shape[1]), w(f"{name}.bias", x.shape[1]), eps)


@dataclass(frozen=True)
class Pesser:
    """Ho et al.'s U-Net: sines before cosines, frequencies that end at 1 / 10000, one head, padding on two sides before halving."""

    width: int
    multipliers: tuple[int, ...]
    layers: int
    attends: frozenset[int]
    """Levels, 0 the finest."""

    def __call__(self, w: Weights, x: Tensor, time: Tensor) -> Tensor:
        half = self.width // 2
        angles = time.float()[:, None] * torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1))).to(x.device)
        emb = linear(w, "temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1), 4 * self.width)
        emb = linear(w, "temb.dense.1", F.silu(emb), 4 * self.width)
        h = conv(w, "conv_in", x, self.width)
        skips, last = [h], len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.layers):
                h = self._res(w, f"down.{level}.block.{block}", h, emb, multiplier * self.width)
                h = self._attention(w, f"down.{level}.attn.{block}", h) if level in self.attends else h
                skips.append(h)
            if level < last:
                h = conv(w, f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), h.shape[1], stride=2, padding=0)
                skips.append(h)
        h = self._res(w, "mid.block_1", h, emb, h.shape[1])
        h = self._attention(w, "mid.attn_1", h)
        h = self._res(w, "mid.block_2", h, emb, h.shape[1])
        for level in range(last, -1, -1):
            for block in range(self.layers + 1):
                h = self._res(w, f"up.{level}.block.{block}", torch.cat([h, skips.pop()], 1), emb, self.multipliers[level] * self.width)
                h = self._attention(w, f"up.{level}.attn.{block}", h) if level in self.attends else h
            if level:
                h = conv(w, f"up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), h.shape[1])
        assert not skips
        return conv(w, "conv_out", F.silu(normed(w, "norm_out", h, 1e-6)), 3)

    @staticmethod
    def _res(w: Weights, name: str, x: Tensor, emb: Tensor, channels: int) -> Tensor:
        h = conv(w, f"{name}.conv1", F.silu(normed(w, f"{name}.norm1", x, 1e-6)), channels)
        h = h + linear(w, f"{name}.temb_proj", F.silu(emb), channels)[:, :, None, None]
        h = conv(w, f"{name}.conv2", F.silu(normed(w, f"{name}.norm2", h, 1e-6)), channels)
        return h + (x if x.shape[1] == channels else conv(w, f"{name}.nin_shortcut", x, channels, size=1, padding=0))

    @staticmethod
    def _attention(w: Weights, name: str, x: Tensor) -> Tensor:
        inner, channels = normed(w, f"{name}.norm", x, 1e-6), x.shape[1]
        q, k, v = (conv(w, f"{name}.{part}", inner, channels, size=1, padding=0).flatten(2) for part in "qkv")
        shares = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(channels), dim=-1)
        return x + conv(w, f"{name}.proj_out", (v @ shares.transpose(1, 2)).reshape(x.shape), channels, size=1, padding=0)


@dataclass(frozen=True)
class OpenAI:
    """openai's U-Net: cosines before sines, blocks numbered in the order in which they are run.

    One of heads and head_channels. order: legacy rows are (head, of q k v, channel), new ones (of q k v, head, channel). scale_shift:
    the embedding scales and shifts the second normalization. resample: residual blocks halve and double."""

    width: int
    multipliers: tuple[int, ...]
    layers: int
    attends: frozenset[int]
    heads: int | None = None
    head_channels: int | None = None
    order: str = "legacy"
    scale_shift: bool = True
    resample: bool = True
    classes: int | None = None
    outputs: int = 6

    def __call__(self, w: Weights, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.width // 2
        angles = time.float()[:, None] * torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / half)).to(x.device)
        emb = linear(w, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * self.width)
        emb = linear(w, "time_embed.2", F.silu(emb), 4 * self.width)
        if self.classes is not None:
            assert labels is not None
            emb = emb + w("label_emb.weight", self.classes, 4 * self.width)[labels]
        h = conv(w, "input_blocks.0.0", x, self.width)
        skips, last = [h], len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(self.layers):
                name = f"input_blocks.{len(skips)}"
                h = self._res(w, f"{name}.0", h, emb, multiplier * self.width)
                h = self._attention(w, f"{name}.1", h) if level in self.attends else h
                skips.append(h)
            if level < last:
                name = f"input_blocks.{len(skips)}.0"
                h = self._res(w, name, h, emb, h.shape[1], "halve") if self.resample else conv(w, f"{name}.op", h, h.shape[1], stride=2)
                skips.append(h)
        h = self._res(w, "middle_block.0", h, emb, h.shape[1])
        h = self._attention(w, "middle_block.1", h)
        h = self._res(w, "middle_block.2", h, emb, h.shape[1])
        number = 0
        for level in range(last, -1, -1):
            for block in range(self.layers + 1):
                name, place = f"output_blocks.{number}", 1
                h = self._res(w, f"{name}.0", torch.cat([h, skips.pop()], 1), emb, self.multipliers[level] * self.width)
                if level in self.attends:
                    h, place = self._attention(w, f"{name}.1", h), 2
                if level and block == self.layers:
                    name = f"{name}.{place}"
                    h = (
                        self._res(w, name, h, emb, h.shape[1], "double")
                        if self.resample
                        else conv(w, f"{name}.conv", _doubled(h), h.shape[1])
                    )
                number += 1
        assert not skips
        return conv(w, "out.2", F.silu(normed(w, "out.0", h, 1e-5)), self.outputs)

    def _res(self, w: Weights, name: str, x: Tensor, emb: Tensor, channels: int, change: str = "") -> Tensor:
        h = F.silu(normed(w, f"{name}.in_layers.0", x, 1e-5))
        if change:
            h, x = (_doubled(h), _doubled(x)) if change == "double" else (_halved(h), _halved(x))
        h = conv(w, f"{name}.in_layers.2", h, channels)
        told = linear(w, f"{name}.emb_layers.1", F.silu(emb), channels * (2 if self.scale_shift else 1))[:, :, None, None]
        if self.scale_shift:
            h = normed(w, f"{name}.out_layers.0", h, 1e-5) * (1 + told[:, :channels]) + told[:, channels:]
        else:
            h = normed(w, f"{name}.out_layers.0", h + told, 1e-5)
        h = conv(w, f"{name}.out_layers.3", F.silu(h), channels)
        return h + (x if x.shape[1] == channels else conv(w, f"{name}.skip_connection", x, channels, size=1, padding=0))

    def _attention(self, w: Weights, name: str, x: Tensor) -> Tensor:
        count, channels = x.shape[:2]
        flat = normed(w, f"{name}.norm", x, 1e-5).flatten(2)
        joint = F.conv1d(flat, w(f"{name}.qkv.weight", 3 * channels, channels, 1), w(f"{name}.qkv.bias", 3 * channels))
        heads = self.heads if self.heads is not None else channels // (self.head_channels or channels)
        if self.order == "legacy":
            q, k, v = joint.reshape(count, heads, 3, channels // heads, -1).unbind(2)
        else:
            q, k, v = joint.reshape(count, 3, heads, channels // heads, -1).unbind(1)
        shares = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(channels // heads), dim=-1)
        mixed = torch.einsum("bhqk,bhck->bhcq", shares, v).reshape(count, channels, -1)
        out = F.conv1d(mixed, w(f"{name}.proj_out.weight", channels, channels, 1), w(f"{name}.proj_out.bias", channels))
        return x + out.reshape(x.shape)


def _doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _halved(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
