"""`halfstep shards draw`: images of a finished model, drawn once by all ranks and packed as shards, to train others on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, final

import diffusers
import torch
from PIL import Image

from data_shards import ranks
from data_shards.derive.derive import DONE, Asked, derive_from
from data_shards.derive.members import MemberReader
from data_shards.derive.request import DeriveJob, DrawRequest, is_finished
from data_shards.index import Json, Shard, ShardIndex
from data_shards.sources.folder import stated_licence
from trainer.config_sections import Sampler
from trainer.sample import draw_share, png, sampling_timesteps
from trainer.source import Source, denoiser_on, load_source


class Beat(Protocol):
    """The rank's heartbeat."""

    def phase(self, name: str, step: int) -> None:
        """Say what is done from now on."""
        ...

    def tick(self) -> None:
        """Say that a long phase makes progress."""
        ...


def draw_job(run_dir: Path, options: Mapping[str, object], stop: Asked, beat: Beat) -> int:
    """What each rank does: draw the shards that OUT/run/derive.json asks for. Collective.

    Raises: ValueError for a model that is not there, is of latents, or has fewer levels than steps are asked for."""
    job = DeriveJob.read(run_dir)
    assert isinstance(job.request, DrawRequest), "a draw job has a draw request"
    if is_finished(run_dir.parent):
        return DONE
    beat.phase("import", 0)
    artist = Artist(load_source(Path(job.request.source), job.request.steps), job.request, tick=beat.tick)
    return derive_from(artist.wanted(), job, run_dir.parent, artist, stop=stop, beat=beat)


@final
class Artist:
    """A model that draws image i of a request from the noise of seed + i, as `halfstep sample` does, whichever rank asks for it."""

    extensions = ("png",)
    keeps_images = True

    def __init__(self, source: Source, request: DrawRequest, *, tick: Callable[[], None]) -> None:
        """Moves the model to this rank's device. Raises: ValueError if it has fewer than `request.steps` levels."""
        self._source, self._request, self._tick = source, request, tick
        self._steps = request.steps or source.descriptor.step_count
        self._sampler: Sampler = request.sampler or source.descriptor.sampler
        sampling_timesteps(source.descriptor, self._steps)
        self._predict = denoiser_on(source.model, ranks.device(), precision=request.precision)

    def wanted(self) -> ShardIndex:
        """An index of the shards to be made, whose samples have no members yet, and which says how they come about."""
        shards, first = [], 0
        for number, samples in enumerate(self._request.shards):
            keys = tuple(f"{image:08d}" for image in range(first, first + samples))
            shards.append(Shard(f"shard-{number:06d}.tar", 0, "", keys, {}))
            first += samples
        return ShardIndex(
            root=Path(self._request.source),
            image_size=self._source.descriptor.image_size,
            licence=stated_licence(self._request.licence),
            source={
                "kind": "drawn",
                "weights_sha256": self._source.weights_sha256,
                "steps": self._steps,
                "sampler": self._sampler,
                "seed": self._request.seed,
            },
            pack={"image_format": "png"},
            shards=tuple(shards),
            sha256="",
        )

    @property
    def models(self) -> Json:
        """The weights, and what they mean: another model cannot go on with what this one has begun."""
        return {"model": {"weights_sha256": self._source.weights_sha256, "descriptor": self._source.descriptor.to_json()}}

    def read(self, reader: MemberReader, shard: int, position: int) -> int:
        """Which image it is."""
        return shard * self._request.samples_per_shard + position

    def make(self, samples: Sequence[int]) -> list[tuple[Mapping[str, bytes], object]]:
        """Its pixels. samples: consecutive numbers."""
        assert list(samples) == list(range(samples[0], samples[0] + len(samples))), "a batch is a piece of one shard"
        images = draw_share(
            self._predict,
            self._source,
            steps=self._steps,
            seed=self._request.seed,
            indices=range(samples[0], samples[0] + len(samples)),
            sampler=self._sampler,
            batch_size=len(samples),
            device=ranks.device(),
            on_step=lambda _: self._tick(),
        )
        return [({"png": png(Image.fromarray(image.squeeze()))}, None) for image in images.numpy()]

    def facts(self, notes: Sequence[object]) -> Json:
        """On what they were drawn."""
        versions = {module.__name__: module.__version__ for module in (torch, diffusers)}
        return {"device": ranks.device().type, "versions": versions, "counts": {"drawn": len(notes)}}
