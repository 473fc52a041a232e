"""The README.md of a latent model's export: what it is, what it was made from, how it is drawn with."""

import json
from dataclasses import dataclass
from typing import Literal, final

from trainer.config import LatentBaseConfig, LoraAdaptation, RunConfig
from trainer.export_folder import is_hub_id, public_name
from trainer.latents.finished import Finished, base_name
from trainer.latents.snippet import Form, prompts_of
from trainer.latents.trained import latent_objective
from trainer.model_card import HUB_LICENCES, data_section, table

_FAMILIES = {
    "latent_base": "latent diffusion",
    "stable_diffusion": "Stable Diffusion",
    "wuerstchen_prior": "Wuerstchen's prior",
    "kandinsky22_prior": "Kandinsky 2.2's prior",
    "kandinsky22_decoder": "Kandinsky 2.2's decoder",
}
_FAMILY_TAGS = {
    "latent_base": "latent-diffusion",
    "stable_diffusion": "stable-diffusion",
    "wuerstchen_prior": "wuerstchen",
    "kandinsky22_prior": "kandinsky",
    "kandinsky22_decoder": "kandinsky",
}


@final
@dataclass(frozen=True, eq=False)
class CardFacts:
    """What the card is written from."""

    finished: Finished
    form: Form
    code: str
    """The example."""
    samples: Literal["sheet", "drawn"] | None
    """What samples.png beside the card is: the run's last sheet, or drawn for the card."""
    files: tuple[str, ...]
    """Of an adapter, beside diffusers' own."""


def latent_card(facts: CardFacts) -> str:
    """The card's Markdown."""
    sections = (
        _header(facts),
        _summary(facts),
        _samples(facts),
        f"## How to draw with it\n\n```python\n{facts.code}\n```",
        _files(facts),
        _recipe(facts.finished),
        _data(facts.finished),
        _limits(facts),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(facts: CardFacts) -> str:
    """YAML for the Hub."""
    recipe = facts.finished.recipe
    inpaints = latent_objective(recipe).inpainting is not None
    base, _ = base_name(recipe)
    lines = ["---", "library_name: diffusers", f"pipeline_tag: {'image-to-image' if inpaints else 'text-to-image'}"]
    if isinstance(recipe.model, LatentBaseConfig):
        names = {str(index.licence.get("name")) for index in facts.finished.indexes}
        lines += [f"license: {HUB_LICENCES[name]}" for name in names if len(names) == 1 and name in HUB_LICENCES]
    elif is_hub_id(base):
        lines.append(f"base_model: {base.partition('@')[0]}")
    if recipe.dreambooth and recipe.dreambooth.instance_prompt:
        lines.append(f"instance_prompt: {json.dumps(recipe.dreambooth.instance_prompt, ensure_ascii=False)}")
    tags = ["halfstep", "diffusers", "diffusers-training", _FAMILY_TAGS[recipe.model.kind], "inpainting" if inpaints else "text-to-image"]
    tags += ["lora"] if facts.form == "lora" else []
    tags += ["dreambooth"] if recipe.dreambooth else []
    return "\n".join((*lines, "tags:", *(f"- {tag}" for tag in tags), "---"))


def _summary(facts: CardFacts) -> str:
    recipe = facts.finished.recipe
    what = _FAMILIES[recipe.model.kind]
    inpaints = latent_objective(recipe).inpainting is not None
    title = f"{what}, {'filling masks' if inpaints else 'text to image'}"
    base, revision = base_name(recipe)
    named = f"`{public_name(base)}`" + (f" at revision `{revision}`" if revision else "")
    if isinstance(recipe.model, LatentBaseConfig):
        text = f"A latent diffusion model with its own text encoder, trained from scratch in the latents of the autoencoder {named}"
    elif facts.form == "lora":
        text = f"Low-rank adapters for {named}, which they need: they hold no weights of it"
    elif facts.finished.is_lora:
        text = f"{named} with low-rank adapters folded into its weights"
    else:
        text = f"{named}, all of whose {facts.finished.network_name} was trained"
    return f"# {title[0].upper()}{title[1:]}\n\n{text}. Made with halfstep."


def _samples(facts: CardFacts) -> str:
    if facts.samples is None:
        return "No pictures were drawn for this card."
    recipe = facts.finished.recipe
    validation = recipe.validation
    how = f"{recipe.logging.sample_steps} steps, guidance {validation.guidance_scale:g}, seeds from {validation.seed}, not selected"
    before = " What stands under `base` was drawn before training." if facts.samples == "sheet" else ""
    return f"![Pictures drawn from fixed seeds](samples.png)\n\nsamples.png: {how}. Prompts: {_prompt_list(recipe)}.{before}"


def _prompt_list(recipe: RunConfig) -> str:
    if not recipe.validation.prompts and not (recipe.dreambooth and recipe.dreambooth.instance_prompt):
        return "captions of the first training images"
    return "; ".join(f"`{prompt}`" for prompt in prompts_of(recipe))


def _files(facts: CardFacts) -> str:
    if facts.form != "lora":
        return ""
    lines = ["`pytorch_lora_weights.safetensors`: diffusers' form, with rank and alpha in its header"]
    what = {
        "kohya": "the same in kohya's form, for other programs",
        "learned_embeds": "the new token's embedding; load it before you use the token in a prompt",
        "scheduler": "the scheduler that it was trained with, which is not the base's",
    }
    for file in facts.files:
        lines += [f"`{file}`: {text}" for mark, text in what.items() if mark in file]
    return "## Files\n\n" + "\n".join(f"- {line}" for line in lines)


def _recipe(finished: Finished) -> str:
    recipe, adaptation, objective = finished.recipe, finished.recipe.adaptation, latent_objective(finished.recipe)
    rows = {
        "Training": _adaptation(recipe),
        "Prediction": str(finished.meaning.get("prediction")),
        "Loss": objective.loss if objective.loss == "mse" else f"{objective.loss}, gamma {objective.min_snr_gamma:g}",
        "Noise": _noise(recipe),
        "Caption dropout": f"{objective.caption_dropout:g}",
        "Optimizer steps": f"{finished.checkpoint.step:,}",
        "Images a step": str(recipe.data.global_batch_size),
        "Image size": "not known" if finished.image_size is None else f"{finished.image_size} pixels",
        "Optimizer": f"{recipe.optim.kind}, learning rate {recipe.optim.learning_rate:g} ({recipe.lr_schedule.kind})",
        "EMA decay": f"{recipe.ema.decay:g} (these are averaged weights)",
        "Precision": recipe.engine.precision,
        "Seed": str(recipe.seed),
        "Trained weights (sha256)": f"`{finished.weights_sha256}`",
    }
    if isinstance(adaptation, LoraAdaptation) and adaptation.targets:
        rows["Targets"] = ", ".join(adaptation.targets)
    if recipe.dreambooth:
        rows["Instance prompt"] = recipe.dreambooth.instance_prompt or "each image's own caption"
        rows["New token"] = recipe.dreambooth.new_token or "none"
        rows["Prior preservation"] = recipe.dreambooth.class_prompt or "none"
    base_sha256 = finished.meaning.get("base_sha256")
    if base_sha256:
        rows["Base (sha256)"] = f"`{base_sha256}`"
    rows = {name: value.replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    return f"## Recipe\n\n{table(('', ''), tuple(rows.items()))}\n\nThe whole of it is in `recipe.yaml`; `descriptor.json` names the parts."


def _adaptation(recipe: RunConfig) -> str:
    adaptation = recipe.adaptation
    text = " and text encoder" if getattr(recipe.model, "train_text_encoder", False) or recipe.model.kind == "latent_base" else ""
    if not isinstance(adaptation, LoraAdaptation):
        return f"all weights{text}"
    kind = "DoRA" if adaptation.dora else "LoRA"
    return f"{kind} of rank {adaptation.rank}, alpha {adaptation.alpha or adaptation.rank:g}{text}"


def _noise(recipe: RunConfig) -> str:
    objective = latent_objective(recipe)
    parts = ["the base's levels" if recipe.noise_schedule.kind == "base" else f"{recipe.noise_schedule.kind} levels"]
    parts += ["shifted to end in noise alone"] if objective.zero_terminal_snr else []
    parts += [f"offset {objective.offset_noise:g}"] if objective.offset_noise else []
    parts += [f"input perturbation {objective.input_perturbation:g}"] if objective.input_perturbation else []
    return ", ".join(parts)


def _data(finished: Finished) -> str:
    if not finished.indexes:
        return data_section(None)
    return "\n\n".join(data_section(index) for index in finished.indexes)


def _limits(facts: CardFacts) -> str:
    recipe = facts.finished.recipe
    lines = []
    if not isinstance(recipe.model, LatentBaseConfig):
        lines.append("The base's own licence and limits hold for this model, too; read its card.")
    lines.append(
        "It was shown what its data section says and nothing else: expect it to be weak outside of that. It has not been evaluated"
    )
    return "## Limits\n\n" + " ".join(lines) + " for bias or safety, and a safety checker is not part of it."
