"""Class images for prior preservation: drawn by the base before the first step, by all ranks together, file by file."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np
from PIL import Image

from data_shards import ranks
from data_shards.config import INDEX_NAME
from data_shards.files import replace_file
from data_shards.packing.pack import pack
from data_shards.sources.folder import FolderSource
from trainer.config import DreamBoothConfig, RunConfig
from trainer.latents.pictures import Pictures
from trainer.models.network import Network
from trainer.prompting.pictures import PictureRequest, Tick
from trainer.rng import derive_seed
from trainer.sample import png

logger = logging.getLogger(__name__)

IMAGES, SHARDS = "class_images", "class_shards"
"""Folders in RUN_DIR."""
_GROUP = 4
"""Images a rank draws in one batch, always the same ones, between two looks at whether to stop."""


@final
class ClassImages:
    """The class images of one run; image i is the same whatever the ranks and attempts that drew it."""

    def __init__(self, config: RunConfig, dreambooth: DreamBoothConfig, run_dir: Path, pictures: Pictures, *, image_size: int) -> None:
        """image_size: side in pixels."""
        self.config, self.dreambooth, self.run_dir = config, dreambooth, run_dir
        self.pictures, self.image_size = pictures, image_size

    def make(self, network: Network, *, fresh: bool, asked_to_stop: Callable[[], bool], tick: Tick) -> bool:
        """Draw what is missing and pack all; False where the job was asked to stop meanwhile. Collective.

        network: of the base, which it only is while the run is fresh: before its first step.
        Raises: ValueError if images are missing of a run that has begun."""
        missing = self._missing()
        if missing and not fresh:
            raise ValueError(
                f"{self.run_dir / IMAGES}: {len(missing)} of {self.dreambooth.class_images} class images are gone, and the run has begun, "
                f"so that its model is not the base any more; put them or {SHARDS}/ back, or start a new --run-dir"
            )
        groups, at_once = sorted({number // _GROUP for number in missing}), ranks.world_size()
        for first in range(0, len(groups), at_once):
            left = [number for number in missing if number // _GROUP >= groups[first]]
            if ranks.any_rank(asked_to_stop()):
                logger.info("asked to stop; %d class images are still to be drawn", len(left))
                return False
            logger.info("class images: %d of %d", self.dreambooth.class_images - len(left), self.dreambooth.class_images)
            self._draw(network, groups[first : first + at_once], left, tick)
        if ranks.is_rank_0():
            self._pack()
        ranks.barrier()
        return True

    def folder(self) -> Path:
        """Of their shards."""
        return (self.run_dir / SHARDS).absolute()

    def _missing(self) -> list[int]:
        """Numbers of the images that are not there, as rank 0 sees them. Collective."""
        numbers: Sequence[int] = ()
        if ranks.is_rank_0() and not (self.run_dir / SHARDS / INDEX_NAME).exists():
            numbers = [number for number in range(self.dreambooth.class_images) if not self._file(number).exists()]
        return [int(text) for text in ranks.all_gather_text(" ".join(map(str, numbers)))[0].split()]

    def _file(self, number: int) -> Path:
        return self.run_dir / IMAGES / f"class_{number:05d}.png"

    def _draw(self, network: Network, groups: Sequence[int], wanted: Sequence[int], tick: Tick) -> None:
        """Draw whole groups, one a rank, and write the images that are wanted. Collective."""
        # The last bits of an image depend on what is drawn with it: so the last group is whole, too, and no rank gets less than a group.
        whole = [*groups, *[groups[-1]] * (ranks.world_size() - len(groups))]
        numbers = [group * _GROUP + place for group in whole for place in range(_GROUP)]
        drawn = self.pictures.draw_requests(network, [self._request(number) for number in numbers], tick=tick)
        if ranks.is_rank_0():
            (self.run_dir / IMAGES).mkdir(exist_ok=True)
            images = dict(zip(numbers, drawn.numpy(), strict=True))
            for number in set(wanted) & images.keys():
                replace_file(self._file(number), png(Image.fromarray(images[number])))

    def _request(self, number: int) -> PictureRequest:
        size = (self.image_size, self.image_size)
        # An inpainting base draws a whole image where everything is masked; what lies under the mask it does not see.
        whole = self.config.objective.kind == "latent_denoising" and self.config.objective.inpainting is not None
        grey, white = np.full((*size, 3), 128, np.uint8), np.full(size, 255, np.uint8)
        return PictureRequest(
            prompt=self.dreambooth.class_prompt or "",
            seed=derive_seed(self.config.seed, "class images", number),
            guidance_scale=self.dreambooth.class_guidance,
            steps=self.dreambooth.class_steps,
            size=size,
            image=Image.fromarray(grey) if whole else None,
            mask=Image.fromarray(white) if whole else None,
        )

    def _pack(self) -> None:
        if not (self.run_dir / SHARDS / INDEX_NAME).exists():
            source = FolderSource.scan(self.run_dir / IMAGES, licence="drawn by the base model; see its licence")
            pack(source, self.run_dir / SHARDS, size=self.image_size)
