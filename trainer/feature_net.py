"""A small convolutional net that reads attributes off images; its inner features are what the quality numbers are made of."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from trainer.rng import generator

ARCHITECTURE = "cnn-32-64-96-pool-4-features-64-v1"
"""Changes with anything that changes the weights a training ends with, so that old numbers are never taken for new ones."""
FEATURES = 64
FEWEST_IMAGES = 16
MOST_VALUES = 40
_WIDTHS = (32, 64, 96)
_POOLED = 4
LARGEST_PIXELS = 64
"""Of a side; larger images are averaged down to it."""
UPDATES = 300
_BATCH_IMAGES = 64
_PEAK_LEARNING_RATE = 3e-3
_HELD_OUT_SHARE = 0.1
_READ_IMAGES = 500
_UNKNOWN = -100
"""The class number of values too rare to be learnt; no loss and no accuracy counts them."""


@final
@dataclass(frozen=True)
class Attribute:
    """What the net reads, and the values it can tell apart."""

    name: str
    values: tuple[str, ...]


@final
class FeatureNet(nn.Module):
    """Three convolutions, a 4x4 pooling, 64 features of unit variance, and a linear classifier for each attribute.

    Images of more than 64 pixels a side are averaged down to 64 first, so the cost is bounded."""

    def __init__(self, attributes: Sequence[Attribute], stream: torch.Generator | None = None) -> None:
        super().__init__()
        self.value_counts = [len(attribute.values) for attribute in attributes]
        with torch.random.fork_rng(devices=[]):  # the layers draw weights that are overwritten below
            self._build()
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=stream)
            elif name == "classifiers.bias":
                nn.init.zeros_(parameter)

    def _build(self) -> None:
        first, second, third = _WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(third),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(_POOLED),
            nn.Flatten(),
        )
        self.projection = nn.Linear(third * _POOLED**2, FEATURES, bias=False)
        self.scale = nn.BatchNorm1d(FEATURES, affine=False)
        self.classifiers = nn.Linear(FEATURES, sum(self.value_counts))

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Features of images in 0 ... 255; over the training images each has mean 0 and variance 1."""
        return self.scale(self.projection(self.body(self._stem_of(images))))

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c i j"], ...]:
        """What the three convolutions make of images in 0 ... 255, after batch norm and ReLU."""
        first = self._stem_of(images)
        second = self.body[:3](first)
        return first, second, self.body[3:6](second)

    def _stem_of(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        pixels = images.float() / 127.5 - 1
        if max(pixels.shape[-2:]) > LARGEST_PIXELS:
            pixels = F.interpolate(pixels, size=(LARGEST_PIXELS, LARGEST_PIXELS), mode="area")
        hidden = self.stem(pixels)
        return F.avg_pool2d(hidden, 2) if min(pixels.shape[-2:]) == LARGEST_PIXELS else hidden

    def logits(self, features: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b v"], ...]:
        """For each attribute the unnormalised log-probabilities of its values."""
        return self.classifiers(F.relu(features)).split(self.value_counts, dim=1)


@final
@dataclass(frozen=True, eq=False)
class TrainedFeatureNet:
    """A net with what it reads, and how well: the share of held-out images whose attribute it names."""

    net: FeatureNet
    attributes: tuple[Attribute, ...]
    held_out_accuracy: Mapping[str, float]

    @property
    def mean_accuracy(self) -> float:
        """Held-out accuracy over all attributes, in 0 ... 1."""
        return sum(self.held_out_accuracy.values()) / len(self.held_out_accuracy)


def choose_attributes(rows: Sequence[Mapping[str, str]]) -> tuple[Attribute, ...]:
    """The attributes worth learning: those with 2 to 40 values that each occur in at least 1 of 500 images (and twice).

    rows: one mapping an image; an attribute that an image lacks has the value "none"."""
    fewest = max(2, len(rows) // 500)
    chosen = []
    for name in sorted({name for row in rows for name in row}):
        counts = Counter(row.get(name, "none") for row in rows)
        values = tuple(sorted(value for value, count in counts.items() if count >= fewest))
        if 2 <= len(values) <= MOST_VALUES:
            chosen.append(Attribute(name, values))
    return tuple(chosen)


def train_feature_net(
    images: UInt8[Tensor, "b 3 h w"], rows: Sequence[Mapping[str, str]], *, seed: int, updates: int = UPDATES
) -> TrainedFeatureNet:
    """Train the net to read the attributes; a pure function of its arguments on one kind of CPU, about 10 s on one core.

    images: in 0 ... 255, in random order: the first tenth is held out to measure the accuracy.
    Raises: ValueError if there are fewer than 16 images or no attribute with 2 to 40 values."""
    attributes = choose_attributes(rows)
    if len(images) < FEWEST_IMAGES or not attributes:
        raise ValueError(
            f"{len(images)} images with {len(attributes)} usable attributes cannot train a feature net; "
            f"wanted at least {FEWEST_IMAGES} images and one attribute of 2 to {MOST_VALUES} values"
        )
    classes = _classes(rows, attributes)
    held_out = max(2, int(len(images) * _HELD_OUT_SHARE))
    with _one_thread():
        net = FeatureNet(attributes, generator(seed, "feature_net", "init"))
        _fit(net, images[held_out:], classes[held_out:], updates=updates, stream=generator(seed, "feature_net", "order"))
        net.requires_grad_(False).eval()
        right = (read_attributes(net, images[:held_out]) == classes[:held_out]).sum(dim=0)
    known = (classes[:held_out] != _UNKNOWN).sum(dim=0).clamp(min=1)
    accuracy = {attribute.name: float(share) for attribute, share in zip(attributes, right / known, strict=True)}
    return TrainedFeatureNet(net, attributes, accuracy)


def features_of(net: FeatureNet, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """Features of any number of images, computed a few hundred at a time."""
    with torch.inference_mode():
        return torch.cat([net(chunk) for chunk in images.split(_READ_IMAGES)])


def read_attributes(net: FeatureNet, images: UInt8[Tensor, "b 3 h w"]) -> Int64[Tensor, "b n"]:
    """For each image and attribute the number of the likeliest value."""
    return classify(net, features_of(net, images))


def classify(net: FeatureNet, features: Float[Tensor, "b d"]) -> Int64[Tensor, "b n"]:
    """As read_attributes, from features that are already there."""
    with torch.inference_mode():
        return torch.stack([logits.argmax(dim=1) for logits in net.logits(features)], dim=1)


def _classes(rows: Sequence[Mapping[str, str]], attributes: Sequence[Attribute]) -> Int64[Tensor, "b n"]:
    numbers = [{value: number for number, value in enumerate(attribute.values)} for attribute in attributes]
    return torch.tensor(
        [[n.get(row.get(attribute.name, "none"), _UNKNOWN) for n, attribute in zip(numbers, attributes, strict=True)] for row in rows]
    )


def _fit(
    net: FeatureNet, images: UInt8[Tensor, "b 3 h w"], classes: Int64[Tensor, "b n"], *, updates: int, stream: torch.Generator
) -> None:
    """A fixed number of AdamW updates over shuffled passes; the learning rate rises for a tenth of them, then falls to 0."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=1e-2)
    for update, chosen in zip(range(updates), _batches(len(images), stream), strict=False):
        progress = (update + 1) / updates
        rate = _PEAK_LEARNING_RATE * min(progress / 0.1, (1 + math.cos(math.pi * max(0.0, progress - 0.1) / 0.9)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = net.logits(net(images[chosen]))
        losses = [F.cross_entropy(each, classes[chosen, n], ignore_index=_UNKNOWN, reduction="sum") for n, each in enumerate(logits)]
        optimizer.zero_grad()
        (torch.stack(losses).sum() / len(chosen)).backward()
        optimizer.step()


def _batches(count: int, stream: torch.Generator) -> Iterator[Tensor]:
    """Image numbers, a batch at a time, without end: pass after pass, the remainder of each left out."""
    size = min(_BATCH_IMAGES, count)
    while True:
        order = torch.randperm(count, generator=stream)
        yield from order[: count // size * size].split(size)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of threads of the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
