"""What studies on embedded faces share: runs by the command line, kept pictures, and a net that reads both styles."""

import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data_shards.files import json_text, replace_file
from data_shards.index import ShardIndex
from data_shards.reading.read import read_all
from data_shards.reading.sample import MicroBatch
from trainer.config_sections import Sampler
from trainer.feature_net import FeatureNet, features_of, train_feature_net
from trainer.frechet import frechet_distance, mean_and_covariance
from trainer.rng import generator
from trainer.sample import draw_images
from trainer.source import Source

Pictures = UInt8[Tensor, "b h w c"]


def halfstep(*words: str) -> None:
    """Run a command to its end. Raises: subprocess.CalledProcessError if it fails."""
    sys.stdout.write(f"halfstep {' '.join(words)}\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "launch", *words], check=True)


def pack(folder: Path, style: str, *, count: int, pixels: int, start: int = 0) -> None:
    """Faces start ... start + count - 1 of a style, unless they are there already."""
    if not (folder / "index.json").exists():
        numbers = ("--start", str(start), "--count", str(count), "--size", str(pixels))
        halfstep("shards", "pack", "--source", "faces", "--style", style, *numbers, "--out", str(folder))


def read(folder: Path) -> MicroBatch:
    """All samples of a folder of faces."""
    return read_all(ShardIndex.load(folder), ("image", "caption", "attributes"))


def commit() -> str:
    """Of this checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def kept(path: Path, make: Callable[[], Pictures]) -> Pictures:
    """The pictures in a file; where there is none, those that are made now and written there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, make().numpy())
        replace_file(path, content.getvalue())
    return torch.from_numpy(np.load(path, allow_pickle=False))


def drawn(source: Source, *, steps: int, count: int, sampler: Sampler | None = None) -> Pictures:
    """What a model draws from noise that is the same for all, in the precision of its recipe, as `halfstep evaluate` draws."""
    return draw_images(source, steps=steps, seed=0, count=count, sampler=sampler, precision=source.recipe.engine.precision)


def take_weights_away(run_dir: Path) -> None:
    """Remove the weights of a run whose pictures are kept: a study has many; its recipe and metrics stay."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(run_dir / name)


def folder_of(root: Path, *, seed: int, name: str) -> Path:
    """Where a study keeps the variant of this name with one seed."""
    return root / f"seed_{seed}" / name.replace(",", "").replace(" ", "_")


def check_settings(root: Path, settings: Mapping[str, object]) -> None:
    """Note what is run below `root`. Raises: ValueError if that was something else before."""
    note, text = root / "settings.json", json_text(settings)
    if note.exists() and json.loads(note.read_bytes()) != json.loads(text):
        raise ValueError(f"{root} holds runs of other settings ({note}); give another --root, or remove that folder")
    root.mkdir(parents=True, exist_ok=True)
    replace_file(note, text)


def rows_of(out: Path, settings: Mapping[str, object]) -> list[dict[str, Any]]:
    """The rows that an earlier run with these settings wrote, each with its commit: they need not be measured again. Else none."""
    if not out.exists():
        return []
    found = json.loads(out.read_bytes())
    return found["rows"] if found["size"] == json.loads(json_text(settings)) else []


@final
@dataclass(frozen=True)
class Spread:
    """A figure of several seeds: mean, standard deviation (0 for one seed) and the values."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Rounded to three digits behind the point."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(round(statistics.fmean(values), 3), round(deviation, 3), tuple(round(value, 3) for value in values))

    def __str__(self) -> str:
        digits = 1 if self.mean < 99.95 else 0
        return f"{self.mean:.{digits}f} +- {self.deviation:.{digits}f}" if len(self.values) > 1 else f"{self.mean:.{digits}f}"


@final
class Reader:
    """A net that has learnt to read the attributes of faces of each style, and which style it is; and how far pictures are from each."""

    def __init__(self, faces: Mapping[str, Path], held_out: Mapping[str, Path]) -> None:
        """faces: shards to learn from, by the style's name; held_out: shards to measure against."""
        self.net = feature_net(faces)
        self._references = {name: mean_and_covariance(features_of(self.net, read(folder).images)) for name, folder in held_out.items()}

    def distance(self, pictures: Pictures, style: str) -> float:
        """Frechet distance to held-out faces of a style."""
        return frechet_distance(*mean_and_covariance(self._features(pictures)), *self._references[style])

    def noise_of_difference(self, one: Pictures, other: Pictures, style: str, *, rounds: int = 200) -> float:
        """Standard deviation of distance(one) - distance(other), of pictures from the same noise, by drawing pairs with replacement.

        Source: the paired bootstrap, Efron 1979."""
        reference = self._references[style]
        features = [self._features(pictures) for pictures in (one, other)]
        differences = []
        for number in range(rounds):
            drawn = torch.randint(len(one), (len(one),), generator=generator(number, "bootstrap"))
            first, second = (frechet_distance(*mean_and_covariance(rows[drawn]), *reference) for rows in features)
            differences.append(first - second)
        return statistics.stdev(differences)

    def _features(self, pictures: Pictures) -> Float[Tensor, "b d"]:
        return features_of(self.net, pictures.permute(0, 3, 1, 2).contiguous())


def feature_net(faces: Mapping[str, Path]) -> FeatureNet:
    """A net that has learnt to read the attributes of the faces of all styles, and which style it is."""
    images, rows = [], []
    for name, folder in faces.items():
        batch = read(folder)
        images.append(batch.images)
        rows += [{"style": name} | {f"{name} {key}": value for key, value in row.items()} for row in batch.attributes]
    order = torch.randperm(len(rows), generator=generator(0, "latent_learning"))
    return train_feature_net(torch.cat(images)[order], [rows[number] for number in order], seed=0).net
