"""A checkpoint's tensors as the folder of a stock DDPMPipeline."""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from data_shards.files import fsync_directory, json_text
from trainer.diffusion.schedule import alpha_bar_of_betas, cosine_betas, linear_betas, respaced_betas
from trainer.export_folder import write_folder
from trainer.importing.openai import read_openai
from trainer.importing.pesser import read_pesser
from trainer.importing.settings import BASE_STEPS, Family, Given, Settings, spelled
from trainer.importing.unet import ImportedModel, Tensors

logger = logging.getLogger(__name__)

_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
_BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_OPENAI = "guided-diffusion or improved-diffusion"
_NAMED = 3


def import_pipeline(tensors: Tensors, *, family: Family, given: Given, file: Path, taken: str, out: Path) -> None:
    """Write the model of a checkpoint's tensors to the new folder `out`: model_index.json, unet/, scheduler/ and import.json.

    file: where the tensors are from; taken: where they lay in it. Says what was assumed.
    Raises: ValueError if the tensors are not a model of this family that a stock pipeline can hold."""
    model = read_model(tensors, family=family, given=given, where=str(file))
    scheduler = build_scheduler(model.settings, family=family, learned_variance=model.learned_variance)
    facts = {
        "schema_version": 1,
        "family": family,
        "file": file.name,
        "sha256": _sha256(file),
        "taken": taken,
        "given": dict(given),
        "assumed": dict(model.assumed),
    }

    def fill(folder: Path) -> None:
        DDPMPipeline(unet=model.unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
        (folder / "import.json").write_text(json_text(facts))
        for path in (*folder.rglob("*"), folder):
            fsync_directory(path)

    write_folder(out, fill)
    _report(model, scheduler, out=out)


def check_new(out: Path) -> None:
    """Raises: ValueError if something has that name, which an import never replaces."""
    if os.path.lexists(out):
        raise ValueError(f"--out {out}: is there already; give another name, or remove it first")


def read_model(tensors: Tensors, *, family: Family, given: Given, where: str) -> ImportedModel:
    """The model that the tensors make. Raises: ValueError, beginning with `where`, if they make none of this family."""
    found = _family_of(tensors)
    if found != (family if family == "pesser" else _OPENAI):
        raise ValueError(f"{where}: is no checkpoint of {family}: {_instead(tensors, found)}")
    try:
        return read_pesser(tensors, given) if family == "pesser" else read_openai(tensors, given, family=family)
    except ValueError as error:
        raise ValueError(f"{where}, as {family}: {error}") from error


def build_scheduler(settings: Settings, *, family: Family, learned_variance: bool) -> DDPMScheduler:
    """The noise levels and ancestral steps that a model was made for. Of rescaled times every level that falls on a whole time of
    1000 is taken, counted from the noisy end; so level k was told k + 1 - 1000 / T.

    Fewer steps are spaced as each program spaces them: openai's from end to end; pesser's has none, so that they end at the noisiest.
    Source: openai's gaussian_diffusion.py and respace.py; pesser's diffusion.py."""
    steps = settings.diffusion_steps
    scale = BASE_STEPS / steps  # of linear betas, as openai's get_named_beta_schedule has it
    first, last = scale * _FIRST_BETA, scale * _LAST_BETA
    trained_betas = None
    if settings.rescale_timesteps and steps != BASE_STEPS:
        betas = cosine_betas(steps) if settings.noise_schedule == "cosine" else linear_betas(first, last, steps=steps)
        every = steps // BASE_STEPS
        trained_betas = respaced_betas(alpha_bar_of_betas(betas), range(every - 1, steps, every))
    return DDPMScheduler(
        num_train_timesteps=steps if trained_betas is None else BASE_STEPS,
        beta_schedule=_BETA_SCHEDULES[settings.noise_schedule],  # pyright: ignore[reportArgumentType]
        beta_start=first,
        beta_end=last,
        trained_betas=trained_betas,
        variance_type="learned_range" if learned_variance else settings.variance,  # pyright: ignore[reportArgumentType]
        clip_sample=True,
        prediction_type="epsilon" if settings.prediction == "eps" else "sample",
        timestep_spacing="trailing" if family == "pesser" else "linspace",
    )


def _family_of(tensors: Tensors) -> str | None:
    if "temb.dense.0.weight" in tensors:
        return "pesser"
    if "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors:
        return _OPENAI
    if "time_embedding.linear_1.weight" in tensors:
        return "diffusers"
    return "latents" if any(name.startswith("model.diffusion_model.") for name in tensors) else None


def _instead(tensors: Mapping[str, object], found: str | None) -> str:
    match found:
        case None:
            names = sorted(tensors)
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            return f"its tensors are {', '.join(names[:_NAMED]) or 'none'}{more}"
        case "latents":
            return "it is a latent diffusion model, with text or without; these are read as diffusers' folders: model.base=DIR"
        case "diffusers":
            return "its tensors have diffusers' names already; put them beside their config.json, in a pipeline's folder"
        case _:
            return f"its tensors have the names of {found}; give --as {found}"


def _report(model: ImportedModel, scheduler: DDPMScheduler, *, out: Path) -> None:
    millions = sum(weight.numel() for weight in model.unet.parameters()) / 1e6
    logger.info("%s: %.3fM weights, %d px, %d levels", out, millions, model.image_size, len(scheduler.betas))
    if model.assumed:
        options = " ".join(_option(name, value) for name, value in model.assumed.items())
        logger.info("not in the file, taken as the published models have it; give what is otherwise: %s", options)
    if model.learned_variance:
        logger.info("gives its variance too, with which DDPMPipeline samples; to train, sample or halve it here: --eps-only")
    if model.classes is not None:
        logger.info("conditioned on %d classes: call the U-Net with class_labels, which DDPMPipeline does not", model.classes)


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return spelled(name) if value else spelled(f"no_{name}")
    return f"{spelled(name)} {value}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
