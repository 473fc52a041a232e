"""Finished runs of latent models without any training: tiny bases, and real checkpoints of what was trained, moved at random."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.config import RunConfig
from trainer.config_io import dump_yaml
from trainer.latents.drawing import Drawer, Given, open_drawer, sized_requests
from trainer.latents.trained import build_trained
from trainer.options import Options
from trainer.prompting.painters import painter
from trainer.prompting.pictures import draw
from trainer.prompting.requests import asked
from trainer.save import write_checkpoint
from trainer.tasks.latent import LatentMeaning, levels_of
from trainer.tiny_models.make import make_tiny

SIDE = 64
STEPS = 2
PROMPTS = ("a couple", "a woman")
AT_STEP = 7


@dataclass(frozen=True)
class Bases:
    """Folders of tiny bases; each is made when it is first asked for."""

    root: Path

    def __call__(self, kind: str) -> Path:
        folder = self.root / kind
        return folder if folder.exists() else make_tiny(kind, folder)


def recipe(model: Mapping[str, object], **sections: Mapping[str, object]) -> RunConfig:
    """A recipe that says how its pictures are drawn, in few steps."""
    values: dict[str, object] = {
        "data": {"faces": {"count": 8, "size": SIDE}, "image_size": SIDE, "global_batch_size": 4, "micro_batch_size": 1},
        "model": dict(model),
        "objective": {"kind": "latent_denoising"},
        "train": {"steps": AT_STEP},
        "logging": {"sample_steps": STEPS},
        "validation": {"prompts": PROMPTS, "guidance_scale": 3.0},
        "engine": {"precision": "bf16"},
    }
    return RunConfig.model_validate({**values, **{name: dict(section) for name, section in sections.items()}})


def write_run(run_dir: Path, config: RunConfig, *, moved: float = 0.05) -> Path:
    """The folder of a run that ended after 7 steps; moved: by how much its averaged weights differ from where they began."""
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_yaml(config))
    trained = build_trained(config)
    generator = torch.Generator().manual_seed(3)
    learnt = {name: parameter for name, parameter in trained.module.named_parameters() if parameter.requires_grad}
    averaged = {name: parameter.detach() + moved * torch.randn(parameter.shape, generator=generator) for name, parameter in learnt.items()}
    levels = levels_of(config, trained)
    meaning = LatentMeaning(
        kind=config.model.kind,
        base_sha256=trained.files and trained.files.sha256,
        vae_sha256=None,
        text_sha256=None,
        image_sha256=None,
        prediction="eps" if levels is None else levels.prediction,
        alpha_bar_sha256=None,
        adapter=config.adaptation.kind,
    )
    parts = {"model": {name: tensor + 1 for name, tensor in averaged.items()}, "ema": averaged}
    write_checkpoint(run_dir, AT_STEP, parts=parts, facts={"descriptor": meaning.to_json(), "ema_decays": [0.995]})
    return run_dir


def drawn(path: Path, options: Options, given: Given | None = None) -> np.ndarray:
    """What `halfstep sample` draws, as numbers."""
    drawer = open_drawer(path, given or Given())
    return drawn_by(drawer, options)


def drawn_by(drawer: Drawer, options: Options) -> np.ndarray:
    """The same of pipelines that are there."""
    requests = sized_requests(asked(options), drawer)
    return draw(painter(drawer.pipeline, drawer.decoder), requests, batch_size=2).numpy().astype(int)


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    """In levels of 0 ... 255."""
    assert first.shape == second.shape, f"{first.shape} and {second.shape}"
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def as_array(images: list[Image.Image]) -> np.ndarray:
    """A pipeline's images as numbers."""
    return np.stack([np.asarray(image) for image in images]).astype(int)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    """One a picture."""
    return [torch.Generator("cpu").manual_seed(seed + number) for number in range(count)]


def run_card(folder: Path, work: Path, models: Mapping[str, Path], *, decoder_steps: int | None = None) -> np.ndarray:
    """Execute the card's example where its names are links, and return the picture that it saves.

    decoder_steps: of Kandinsky's decoder, whose own default of 100 takes seconds; None changes nothing."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    if decoder_steps is not None:
        before, call = code, "decoder(embeds, negative_embeds, "
        code = code.replace(call, f"{call}num_inference_steps={decoder_steps}, ")
        assert code != before
    work.mkdir()
    for name, target in {folder.name: folder, **models}.items():
        (work / name).symlink_to(target.resolve())
    write_inpainting_files(work)
    with contextlib.chdir(work):
        exec(compile(code, str(folder / "README.md"), "exec"), {})  # noqa: S102 (the card's own lines)
    return np.asarray(Image.open(work / "sample.png")).astype(int)


def write_inpainting_files(folder: Path) -> tuple[Path, Path]:
    """An image and a mask, white on its right half."""
    pixels = np.linspace(0, 255, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:, SIDE // 2 :] = 255
    image_file, mask_file = folder / "image.png", folder / "mask.png"
    Image.fromarray(pixels).save(image_file)
    Image.fromarray(mask).save(mask_file)
    return image_file, mask_file
