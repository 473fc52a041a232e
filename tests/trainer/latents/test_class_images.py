"""Class images: the same files whatever the ranks and attempts, none drawn twice, and none once the run has begun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from data_shards import ranks
from data_shards.index import ShardIndex
from tests.trainer.latents.finished_runs import recipe
from trainer.latents.class_images import ClassImages
from trainer.latents.pictures import Pictures
from trainer.models.network import Network
from trainer.prompting.pictures import PictureRequest, Tick
from trainer.rng import generator

COUNT, SIZE = 10, 16


@dataclass
class Drawn:
    """Stands for `Pictures`: an image shows its seed, and the seeds that are drawn with it in one batch."""

    calls: list[list[int]] = field(default_factory=list)

    def draw_requests(self, network: Network, requests: Sequence[PictureRequest], *, tick: Tick) -> UInt8[Tensor, "b h w c"]:
        assert {request.prompt for request in requests} == {"a cartoon"} and all(request.steps == 3 for request in requests)
        share = -(-len(requests) // ranks.world_size())
        seeds = [request.seed for request in requests]
        self.calls.append(seeds)
        images = []
        for place, seed in enumerate(seeds):
            rank, within = divmod(place, share)
            batch = seeds[rank * share : (rank + 1) * share][within // 4 * 4 : within // 4 * 4 + 4]
            stream = generator(seed, *batch)
            images.append(torch.randint(0, 256, (SIZE, SIZE, 3), generator=stream, dtype=torch.uint8))
        return torch.stack(images)


def _class_images(run_dir: Path, pictures: Drawn, **objective: object) -> ClassImages:
    config = recipe(
        {"kind": "stable_diffusion"},
        dreambooth={"class_prompt": "a cartoon", "class_images": COUNT, "class_steps": 3},
        objective={"kind": "latent_denoising", **objective},
    )
    assert config.dreambooth is not None
    run_dir.mkdir(exist_ok=True)
    return ClassImages(config, config.dreambooth, run_dir, cast("Pictures", pictures), image_size=SIZE)


def _make(images: ClassImages, *, fresh: bool = True, stops: Sequence[bool] = ()) -> bool:
    asked = iter(stops)
    return images.make(cast("Network", None), fresh=fresh, asked_to_stop=lambda: next(asked, False), tick=lambda: None)


def _files(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run_dir / "class_images").iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files that one rank draws in one attempt."""
    assert _make(_class_images(tmp_path / "whole", Drawn()))
    files = _files(tmp_path / "whole")
    assert len(files) == len(set(files.values())) == COUNT
    return files


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_files_do_not_depend_on_the_ranks(
    world_size: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    monkeypatch.setattr(ranks, "all_gather_text", lambda text: [text] * world_size)
    monkeypatch.setattr(ranks, "any_rank", lambda asked: asked)
    monkeypatch.setattr(ranks, "barrier", lambda: None)
    assert _make(_class_images(tmp_path / "run", Drawn()))
    assert _files(tmp_path / "run") == whole


def test_an_attempt_goes_on_where_the_one_before_was_stopped(whole: dict[str, bytes], tmp_path: Path) -> None:
    run_dir, pictures = tmp_path / "run", Drawn()
    assert not _make(_class_images(run_dir, pictures), stops=[False, True])
    kept = {name: (run_dir / "class_images" / name).stat().st_mtime_ns for name in _files(run_dir)}
    assert len(kept) == 4 and not (run_dir / "class_shards").exists()
    assert _make(_class_images(run_dir, pictures))
    assert _files(run_dir) == whole and len(pictures.calls) == 3
    assert {name: (run_dir / "class_images" / name).stat().st_mtime_ns for name in kept} == kept
    assert ShardIndex.load(run_dir / "class_shards").samples == COUNT


def test_only_what_is_missing_is_written_and_as_it_was(whole: dict[str, bytes], tmp_path: Path) -> None:
    run_dir, pictures = tmp_path / "run", Drawn()
    assert not _make(_class_images(run_dir, pictures), stops=[False, False, True])
    for number in (1, 6):
        os.remove(run_dir / "class_images" / f"class_{number:05d}.png")
    assert _make(_class_images(run_dir, pictures))
    assert _files(run_dir) == whole


def test_what_is_packed_is_not_drawn_again_even_without_the_files(tmp_path: Path) -> None:
    run_dir, pictures = tmp_path / "run", Drawn()
    images = _class_images(run_dir, pictures)
    assert _make(images)
    calls = len(pictures.calls)
    for file in (run_dir / "class_images").iterdir():
        os.remove(file)
    assert _make(images, fresh=False) and len(pictures.calls) == calls
    assert images.folder() == (run_dir / "class_shards").absolute()


def test_images_that_are_gone_once_the_run_has_begun_are_an_error(tmp_path: Path) -> None:
    pictures = Drawn()
    with pytest.raises(ValueError, match=r"class_images: 10 of 10 class images are gone, and the run has begun.* start a new --run-dir"):
        _make(_class_images(tmp_path / "run", pictures), fresh=False)
    assert not pictures.calls


def test_an_inpainting_base_paints_the_whole_image(tmp_path: Path) -> None:
    request = _class_images(tmp_path / "run", Drawn(), inpainting={})._request(0)
    assert request.mask is not None and request.image is not None
    assert request.mask.getextrema() == (255, 255) and request.image.size == (SIZE, SIZE)
    assert _class_images(tmp_path / "run", Drawn())._request(0).mask is None
