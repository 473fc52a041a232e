"""The few lines of Python by which stock diffusers draws with an exported latent model; they run as they stand beside its folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from trainer.config import Kandinsky22DecoderConfig, Kandinsky22PriorConfig, RunConfig, StableDiffusionConfig, WuerstchenPriorConfig
from trainer.export_folder import LORA_FILE, is_hub_id, public_name
from trainer.latents.trained import latent_config, latent_objective

TOKEN_FILE = "learned_embeds.safetensors"
"""The name that load_textual_inversion looks for in a folder."""
WUERSTCHEN_DECODER = "warp-ai/wuerstchen"
KANDINSKY_DECODER = "kandinsky-community/kandinsky-2-2-decoder"
ANY_PROMPT = "a portrait"

Form = Literal["pipeline", "lora"]
_SEED = "torch.Generator('cpu').manual_seed(0)".replace("'", '"')


@final
@dataclass(frozen=True)
class Exported:
    """What the lines are to load. name: a folder or Hub repository; image_size: side in pixels of the pictures."""

    recipe: RunConfig
    form: Form
    name: str
    image_size: int | None
    has_token: bool
    pipeline: str
    """Class of the stock pipeline around what was trained."""
    scheduler: str
    """Class of its scheduler."""


def prompts_of(recipe: RunConfig) -> tuple[str, ...]:
    """What a model is asked for in examples: its validation prompts, else its subject's."""
    if recipe.validation.prompts:
        return tuple(recipe.validation.prompts)
    instance = recipe.dreambooth and recipe.dreambooth.instance_prompt
    return (instance or ANY_PROMPT,)


def needs_scheduler(recipe: RunConfig) -> bool:
    """Whether a model is drawn with another scheduler than its base's."""
    objective = latent_objective(recipe)
    return objective.prediction != "base" or objective.zero_terminal_snr


def usage_code(exported: Exported) -> str:
    """The lines."""
    match latent_config(exported.recipe):
        case WuerstchenPriorConfig() as model:
            lines = _wuerstchen(exported, model)
        case Kandinsky22PriorConfig() as model:
            lines = _kandinsky(exported, prior=_of_base(exported, model.base), decoder=public_name(model.decoder or KANDINSKY_DECODER))
        case Kandinsky22DecoderConfig() as model:
            lines = _kandinsky(exported, prior=public_name(model.prior), decoder=_of_base(exported, model.base))
        case _:
            lines = _stable_diffusion(exported)
    folders = _folders(exported)
    where = [f"# To be run where these folders are ({', '.join(folders)}), or with the path in place of the name."]
    return "\n".join([*(where if folders else []), *lines, 'image.save("sample.png")'])


def _folders(exported: Exported) -> list[str]:
    """What the lines load from folders of this machine, not from the Hub."""
    model = latent_config(exported.recipe)
    names = [
        getattr(model, "base", None) if exported.form == "lora" else None,
        getattr(model, "decoder", None),
        getattr(model, "prior", None),
    ]
    own = [] if is_hub_id(exported.name) else [exported.name]
    return [*own, *(public_name(name) for name in names if name is not None and not is_hub_id(name))]


def _stable_diffusion(exported: Exported) -> list[str]:
    recipe = exported.recipe
    inpaints = latent_objective(recipe).inpainting is not None
    kind = exported.pipeline
    base = _of_base(exported, recipe.model.base if isinstance(recipe.model, StableDiffusionConfig) else "")
    lines = [f"import torch\nfrom diffusers import {kind}"]
    scheduler = exported.form == "lora" and needs_scheduler(recipe)
    if scheduler:
        lines[0] = f"import torch\nfrom diffusers import {exported.scheduler}, {kind}"
    if inpaints:
        lines.append("from PIL import Image")
    lines += ["", f'pipeline = {kind}.from_pretrained("{base}"{_revision(exported)})']
    if scheduler:
        lines.append(f'pipeline.scheduler = {exported.scheduler}.from_pretrained("{exported.name}", subfolder="scheduler")')
    if exported.form == "lora":
        if exported.has_token:
            lines.append(f'pipeline.load_textual_inversion("{exported.name}", weight_name="{TOKEN_FILE}")')
        lines.append(f'pipeline.load_lora_weights("{exported.name}", weight_name="{LORA_FILE}")')
    given = []
    if inpaints:
        lines += ['picture = Image.open("image.png").convert("RGB")', 'mask = Image.open("mask.png").convert("L")  # white is painted']
        given = ["image=picture", "mask_image=mask"]
    return [*lines, _call("image = pipeline", [*given, *_size(exported), *_settings(recipe)], exported, end=").images[0]")]


def _wuerstchen(exported: Exported, model: WuerstchenPriorConfig) -> list[str]:
    base, decoder = public_name(model.base), public_name(model.decoder or WUERSTCHEN_DECODER)
    lines = [
        "import torch",
        "from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline",
        "from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior",
        "from transformers import AutoTokenizer, CLIPTextModel",
        "",
    ]
    if exported.form == "lora":
        # The base's own model_index.json may name modules that diffusers has given up.
        lines += _by_parts("WuerstchenPriorPipeline", "prior", base, {"prior": "WuerstchenPrior"}, revision=_revision(exported))
        lines.append(f'prior.load_lora_weights("{exported.name}", weight_name="{LORA_FILE}")')
    else:
        lines.append(f'prior = WuerstchenPriorPipeline.from_pretrained("{exported.name}")')
    parts = {"decoder": "WuerstchenDiffNeXt", "vqgan": "PaellaVQModel"}
    lines += _by_parts("WuerstchenDecoderPipeline", "decoder", decoder, parts, revision="")
    prompt = _quoted(prompts_of(exported.recipe)[0])
    return [
        *lines,
        f"generator = {_SEED}",
        _call("latents = prior", [*_size(exported), *_settings(exported.recipe, drawn=False), "generator=generator"], exported, end=")"),
        f"image = decoder(latents.image_embeddings, prompt={prompt}, generator=generator).images[0]",
    ]


def _kandinsky(exported: Exported, *, prior: str, decoder: str) -> list[str]:
    trained_prior = isinstance(exported.recipe.model, Kandinsky22PriorConfig)
    revision = _revision(exported)
    lines = [
        "import torch",
        "from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline",
        "",
        f'prior = KandinskyV22PriorPipeline.from_pretrained("{prior}"{revision if trained_prior else ""})',
        f'decoder = KandinskyV22Pipeline.from_pretrained("{decoder}"{"" if trained_prior else revision})',
    ]
    if exported.form == "lora":
        network = "prior.prior" if trained_prior else "decoder.unet"
        prefix = "prior" if trained_prior else "unet"
        lines.append(f'{network}.load_lora_adapter("{exported.name}", prefix="{prefix}", weight_name="{LORA_FILE}")')
    settings = (
        [*_settings(exported.recipe, drawn=False, negative=False), "generator=generator"] if trained_prior else ["generator=generator"]
    )
    return [
        *lines,
        f"generator = {_SEED}",
        _call("embeds, negative_embeds = prior", settings, exported, end=").to_tuple()"),
        f"image = decoder(embeds, negative_embeds, {', '.join([*_size(exported), 'generator=generator'])}).images[0]",
    ]


def _by_parts(kind: str, variable: str, source: str, models: dict[str, str], *, revision: str) -> list[str]:
    """A pipeline of Wuerstchen made of its parts, which loads whatever its model_index.json says."""
    parts = {"tokenizer": "AutoTokenizer", "text_encoder": "CLIPTextModel", **models, "scheduler": "DDPMWuerstchenScheduler"}
    loaded = [f'    {part}={model}.from_pretrained("{source}", subfolder="{part}"{revision}),' for part, model in parts.items()]
    return [f"{variable} = {kind}(", *loaded, ")"]


def _of_base(exported: Exported, base: str) -> str:
    """What is loaded of the trained half: the export itself if it is whole, else the base below its adapter."""
    return public_name(base) if exported.form == "lora" else exported.name


def _revision(exported: Exported) -> str:
    revision = getattr(exported.recipe.model, "revision", None)
    return f', revision="{revision}"' if revision and exported.form == "lora" else ""


def _size(exported: Exported) -> list[str]:
    size = exported.image_size
    return [] if size is None else [f"height={size}", f"width={size}"]


def _settings(recipe: RunConfig, *, drawn: bool = True, negative: bool = True) -> list[str]:
    """As the validation pictures are drawn. drawn: with a generator of its own."""
    validation = recipe.validation
    settings = [f"num_inference_steps={recipe.logging.sample_steps}", f"guidance_scale={validation.guidance_scale:g}"]
    if validation.negative_prompt and negative:
        settings.append(f"negative_prompt={_quoted(validation.negative_prompt)}")
    return [*settings, f"generator={_SEED}"] if drawn else settings


def _call(head: str, arguments: Sequence[str], exported: Exported, *, end: str) -> str:
    lines = [f"{head}(", f"    {_quoted(prompts_of(exported.recipe)[0])},", *(f"    {argument}," for argument in arguments)]
    return "\n".join(lines) + f"\n{end}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
