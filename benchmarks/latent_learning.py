"""Does a small latent model learn? Autoencoder, base, LoRA, DreamBooth and inpainting from nothing on embedded faces, measured.

Each stage is a run of its own recipe by the command line, kept below --root: the same command again goes on where it was. Then images
are drawn by the finished runs and compared with held-out faces: by the Frechet distance of the project's own feature net, which has
learnt to read the attributes of both styles, and inside and outside masks by the mean absolute error of pixels. Writes the figures as
JSON and three sheets of pictures beside it, and fails where learning is not what is claimed."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from faces_runs import Pictures, commit, feature_net, halfstep, kept, pack, read
from jaxtyping import Float, UInt8
from measure import machine
from PIL import Image
from torch import Tensor

from data_shards.files import json_text, replace_file
from data_shards.reading.sample import MicroBatch
from trainer.config_io import load_recipe
from trainer.feature_net import FeatureNet, features_of
from trainer.frechet import frechet_distance, mean_and_covariance
from trainer.latents.drawing import Given, open_drawer
from trainer.manifest import newest_checkpoint
from trainer.masks import draw_masks
from trainer.models.inpainting import widen
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw
from trainer.prompting.sheet import SheetGroup, draw_sheet, masked_input
from trainer.sample import png

STYLES = {"old": "open-peeps", "new": "voxel-art"}
FACES, HELD_OUT, PIXELS, CELL_PIXELS = 4000, 256, 32, 2
CLASS_PROMPT = "a cartoon portrait of a person"
STEPS, GUIDANCE, BATCH_SIZE = 12, 2.0, 32
TOLD: Mapping[str, tuple[str, ...]] = {"latent_base": ("new", "class", "old"), "lora": ("new", "class"), "dreambooth": ("new", "class")}
"""Which prompts each run is told: captions of held-out faces, or the class prompt."""
CLAIMS: Mapping[str, tuple[str, float]] = {
    "lora_distance_to_new_style_of_base": ("at most", 0.4),
    "dreambooth_distance_to_old_style_of_lora": ("at most", 0.5),
    "inpainting_error_inside_of_blending_base": ("at most", 0.9),
    "inpainting_error_inside_of_widened_base": ("at most", 0.7),
    "inpainting_error_outside_of_round_trip": ("at most", 1.25),
}
"""Bounds of the ratios that are stated; `X_of_Y`: X divided by Y."""


def main() -> int:
    """Run what is missing, measure, write; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/latent_learning"), help="where shards and runs are kept")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=96, help="drawn images of each measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latent_learning.json")
    parser.add_argument("--only", nargs="*", help="stop after these stages; nothing is measured", default=())
    options = parser.parse_args()
    root = options.root.absolute()
    for stage in STAGES:
        if not options.only or stage.name in options.only:
            stage.run(root, ranks=options.ranks)
    if options.only:
        return 0
    net = feature_net({name: root / "shards" / name for name in STYLES})
    with torch.no_grad():
        figures, sheets = measure(root, net, images=options.images)
    failed = [name for name, (_, bound) in CLAIMS.items() if not figures["ratios"][name] <= bound]
    result = {
        "command": "python benchmarks/latent_learning.py",
        "commit": commit(),
        "machine": machine(),
        "images": options.images,
        **figures,
        "bounds": {name: f"{word} {bound:g}" for name, (word, bound) in CLAIMS.items()},
        "not_as_claimed": failed,
        "steps": {stage.name: _steps(root / stage.name) for stage in STAGES},
        "seconds": {stage.name: _seconds(root / stage.name) for stage in STAGES},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.out, json_text(result))
    for name, sheet in sheets.items():
        replace_file(options.out.with_name(f"{options.out.stem}_{name}.png"), png(sheet.quantize(256)))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    for name in failed:
        sys.stdout.write(f"NOT as claimed: {name} is {figures['ratios'][name]:.3f}, wanted {CLAIMS[name][0]} {CLAIMS[name][1]:g}\n")
    return 1 if failed else 0


@final
@dataclass(frozen=True)
class Stage:
    """One run of the command line below the root; settings: changes to its recipe, {root} being the root."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    exported: bool = True

    def run(self, root: Path, *, ranks: int) -> None:
        """Bring the run to its end, and export it. Raises: subprocess.CalledProcessError if it fails."""
        for data, start, count in (("{}", 0, FACES), ("held_out_{}", FACES, HELD_OUT)):
            for name, style in STYLES.items():
                pack(root / "shards" / data.format(name), style, start=start, count=count, pixels=PIXELS)
        run_dir, began = root / self.name, time.perf_counter()
        if (run_dir / "seconds.json").exists():
            return
        settings = [setting.replace("{root}", str(root)) for setting in self.settings]
        halfstep("train", self.recipe, "--ranks", str(ranks), "--run-dir", str(run_dir), *settings)
        if self.exported and not (run_dir / "export").exists():
            halfstep("export", str(run_dir))
        replace_file(run_dir / "seconds.json", json_text({"seconds": round(time.perf_counter() - began)}))


_BASE, _NEW, _OLD = "model.base={root}/latent_base/export", "data.shards={root}/shards/new", "data.shards={root}/shards/old"
_BOTH = "data.mixture=[{shards: {root}/shards/old}, {shards: {root}/shards/new}]"
STAGES = (
    Stage("autoencoder", "autoencoder_faces", (_BOTH,)),
    Stage("latent_base", "latent_base_faces", (_OLD, "model.autoencoder={root}/autoencoder/export")),
    Stage("lora", "faces_lora", (_NEW, _BASE)),
    Stage("dreambooth", "faces_dreambooth", (_NEW, _BASE)),
    Stage("inpaint", "faces_inpaint", (_OLD, _BASE)),
)


def measure(root: Path, net: FeatureNet, *, images: int) -> tuple[dict[str, dict[str, float]], dict[str, Image.Image]]:
    """Figures by group and name, and sheets by name."""
    held_out = {name: read(root / "shards" / f"held_out_{name}") for name in STYLES}
    vae = cast("AutoencoderKL", AutoencoderKL.from_pretrained(root / "autoencoder/export", local_files_only=True, use_safetensors=True))
    back = {name: _round_trip(vae, batch.images) for name, batch in held_out.items()}
    references = {name: mean_and_covariance(features_of(net, batch.images)) for name, batch in held_out.items()}

    def distance(pictures: Pictures, style: str) -> float:
        return frechet_distance(*mean_and_covariance(features_of(net, pictures.permute(0, 3, 1, 2).contiguous())), *references[style])

    captions = {name: [str(caption) for caption in batch.captions[:images]] for name, batch in held_out.items()}
    drawn = {key: pictures for run in TOLD for key, pictures in _pictures(root, run, captions).items()}
    to_new = {run: distance(drawn[run, "new"], "new") for run in ("latent_base", "lora", "dreambooth")}
    to_old = {run: distance(drawn[run, "class"], "old") for run in ("latent_base", "lora", "dreambooth")}
    errors, filled = _inpainting(root, held_out["old"], back["old"], count=min(images, HELD_OUT))
    figures: dict[str, dict[str, float]] = {
        "autoencoder": {
            f"{kind}_{name}": value
            for name in STYLES
            for kind, value in {
                "mean_absolute_error": float((back[name].float() - held_out[name].images.permute(0, 2, 3, 1)).abs().mean()),
                "psnr_db": _psnr(back[name], held_out[name].images.permute(0, 2, 3, 1)),
                "distance": distance(back[name], name),
            }.items()
        },
        "distance_to_old_style": {
            "of_held_out_new_style": distance(held_out["new"].images.permute(0, 2, 3, 1), "old"),
            "of_base_told_old_captions": distance(drawn["latent_base", "old"], "old"),
            **{f"of_{run}_told_the_class": value for run, value in to_old.items()},
        },
        "distance_to_new_style": {
            "of_held_out_old_style": distance(held_out["old"].images.permute(0, 2, 3, 1), "new"),
            **{f"of_{run}_told_new_captions": value for run, value in to_new.items()},
        },
        "mean_absolute_error_of_255": errors,
        "ratios": {
            "lora_distance_to_new_style_of_base": to_new["lora"] / to_new["latent_base"],
            "dreambooth_distance_to_old_style_of_lora": to_old["dreambooth"] / to_old["lora"],
            "inpainting_error_inside_of_blending_base": errors["inside_inpainting"] / errors["inside_blending_base"],
            "inpainting_error_inside_of_widened_base": errors["inside_inpainting"] / errors["inside_widened_base"],
            "inpainting_error_outside_of_round_trip": errors["outside_inpainting"] / errors["outside_round_trip"],
        },
    }
    rounded = {group: {name: round(value, 3) for name, value in values.items()} for group, values in figures.items()}
    sheets = {"autoencoder": _autoencoder_sheet(held_out, back), "styles": _styles_sheet(drawn, held_out), "inpainting": filled}
    return rounded, sheets


def _pictures(root: Path, run: str, captions: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Pictures]:
    """What a run draws when it is told each kind of prompts. captions: by style."""
    count = len(captions["new"])
    texts = {**captions, "class": [CLASS_PROMPT] * count}
    return {
        (run, name): _kept(root, run, f"{name}_{count}", lambda name=name: _drawn(open_drawer(root / run, Given()).pipeline, texts[name]))
        for name in TOLD[run]
    }


def _kept(root: Path, run: str, name: str, make: Callable[[], Pictures]) -> Pictures:
    """Pictures that were made before with the same weights, else made now."""
    checkpoint = newest_checkpoint(root / run)
    return kept(root / "pictures" / f"{run}_{'' if checkpoint is None else checkpoint.sha256[:12]}_{name}.npy", make)


def _inpainting(root: Path, faces: MicroBatch, back: Pictures, *, count: int) -> tuple[dict[str, float], Image.Image]:
    """Errors inside and outside the masks of held-out faces, and a sheet of some."""
    images = faces.images[:count].permute(0, 2, 3, 1)
    masks = draw_masks(0, 0, faces.keys[:count], size=(PIXELS, PIXELS), shares={"rectangle": 1, "ellipse": 1, "brush": 1}, cell=CELL_PIXELS)
    given = [Image.fromarray(image.numpy()) for image in images]
    painted = [Image.fromarray((mask[0] * 255).byte().numpy()) for mask in masks]
    texts = [str(caption) for caption in faces.captions[:count]]

    def fill(pipeline: DiffusionPipeline) -> Pictures:
        return _drawn(pipeline, texts, given, painted)

    pictures = {
        "blending_base": _kept(root, "latent_base", f"blending_{count}", lambda: fill(_inpainting_base(root, widened=False))),
        "widened_base": _kept(root, "latent_base", f"widened_{count}", lambda: fill(_inpainting_base(root, widened=True))),
        "inpainting": _kept(root, "inpaint", f"filled_{count}", lambda: fill(open_drawer(root / "inpaint", Given()).pipeline)),
    }
    pictures["round_trip"] = back[:count]
    inside = masks.permute(0, 2, 3, 1).bool().expand(images.shape)
    errors = {
        f"{where}_{name}": float((picture.float() - images)[part].abs().mean())
        for where, part in (("inside", inside), ("outside", ~inside))
        for name, picture in pictures.items()
    }
    shown = 8
    seen = torch.stack(
        [torch.from_numpy(masked_input(i, m, (PIXELS, PIXELS))) for i, m in zip(given[:shown], painted[:shown], strict=True)]
    )
    columns = {"face": images, **{name.replace("_", " "): picture for name, picture in pictures.items() if name != "round_trip"}}
    groups = [SheetGroup(title, picture[:shown].unsqueeze(1)) for title, picture in columns.items()]
    return errors, draw_sheet(texts[:shown], groups, given=seen)


def _inpainting_base(root: Path, *, widened: bool) -> DiffusionPipeline:
    """The base, as the stock pipeline fills masks with it: 4 channels, shown the kept part at every step; or 9, the new ones zero."""
    base = cast("StableDiffusionPipeline", open_drawer(root / "latent_base", Given()).pipeline)
    if widened:
        widen(base.unet)  # pyright: ignore[reportArgumentType] (the pipelines' common module)
    return StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)  # pyright: ignore[reportArgumentType]


def _drawn(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    images: Sequence[Image.Image] = (),
    masks: Sequence[Image.Image] = (),
) -> Pictures:
    """One picture a prompt; picture i starts from the noise of seed i, whatever the model."""
    requests = [
        PictureRequest(
            prompt=prompt,
            seed=number,
            guidance_scale=1.0 if masks else GUIDANCE,
            steps=STEPS,
            size=(PIXELS, PIXELS),
            image=images[number] if images else None,
            mask=masks[number] if masks else None,
        )
        for number, prompt in enumerate(prompts)
    ]
    return draw(painter(pipeline), requests, batch_size=BATCH_SIZE)


def _round_trip(vae: AutoencoderKL, images: UInt8[Tensor, "b c h w"]) -> Pictures:
    latents = cast("Tensor", vae.encode(images.float() / 127.5 - 1, return_dict=False)[0].mode())
    decoded = cast("Tensor", vae.decode(latents, return_dict=False)[0])  # pyright: ignore[reportArgumentType] (a stub says FloatTensor)
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def _psnr(a: Pictures, b: Pictures) -> float:
    """Mean over the images, in dB."""
    squares: Float[Tensor, " b"] = (a.float() - b.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / squares)).mean())


def _autoencoder_sheet(held_out: Mapping[str, MicroBatch], back: Mapping[str, Pictures]) -> Image.Image:
    names, shown = list(STYLES), 8
    given = torch.stack([held_out[name].images[:shown].permute(0, 2, 3, 1) for name in names])
    groups = [SheetGroup("held-out faces", given), SheetGroup("what comes back", torch.stack([back[name][:shown] for name in names]))]
    return draw_sheet([STYLES[name] for name in names], groups)


def _styles_sheet(drawn: Mapping[tuple[str, str], Pictures], held_out: Mapping[str, MicroBatch]) -> Image.Image:
    shown = 4
    prompts = {"new": "captions of the new style", "class": CLASS_PROMPT}
    titles = {"latent_base": "base", "lora": "LoRA", "dreambooth": "LoRA, prior preserved"}
    groups = [SheetGroup(title, torch.stack([drawn[run, name][:shown] for name in prompts])) for run, title in titles.items()]
    faces = torch.stack([held_out[name].images[:shown].permute(0, 2, 3, 1) for name in ("new", "old")])
    return draw_sheet(list(prompts.values()), [SheetGroup("held-out faces", faces), *groups])


def _steps(run_dir: Path) -> str:
    """How far the run has come: its weights are what was measured."""
    checkpoint = newest_checkpoint(run_dir)
    return f"{0 if checkpoint is None else checkpoint.step} of {load_recipe(run_dir / 'recipe.yaml', ()).train.steps}"


def _seconds(run_dir: Path) -> int:
    """Of the last attempt, with its export."""
    return int(json.loads((run_dir / "seconds.json").read_bytes())["seconds"])


if __name__ == "__main__":
    sys.exit(main())
