"""Pipelines from folders on this machine: known classes and safetensors alone, nothing of a folder is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from data_shards.derive.request import Precision
from data_shards.encoders.files import weight_files
from data_shards.encoders.precision import hold_in_bf16
from data_shards.files import read_json_object
from trainer.models.deprecated import (
    DDPMWuerstchenScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PaellaVQModel,
    WuerstchenDecoderPipeline,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
    WuerstchenPriorPipeline,
)

Reads = Literal["text", "inpainting"]
"""What a pipeline is told: a text, or also an image and a mask."""

PIPELINES: Mapping[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionInpaintPipeline": StableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    "WuerstchenPriorPipeline": WuerstchenPriorPipeline,
    "WuerstchenDecoderPipeline": WuerstchenDecoderPipeline,
    "KandinskyV22PriorPipeline": KandinskyV22PriorPipeline,
    "KandinskyV22Pipeline": KandinskyV22Pipeline,
}
DECODER_OF: Mapping[str, str] = {
    "WuerstchenPriorPipeline": "WuerstchenDecoderPipeline",
    "KandinskyV22PriorPipeline": "KandinskyV22Pipeline",
}
# Wuerstchen's folders on the Hub name the library `wuerstchen`, which diffusers 0.42 no longer has: it cannot load them itself.
_MOVED: Mapping[str, type[ModelMixin]] = {
    "WuerstchenPrior": WuerstchenPrior,
    "WuerstchenDiffNeXt": WuerstchenDiffNeXt,
    "PaellaVQModel": PaellaVQModel,
}
_MODELS = (
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "PriorTransformer",
    "UNet2DConditionModel",
    "VQModel",
    *_MOVED,
)
_WITHOUT_WEIGHTS = (
    "Scheduler",
    "Tokenizer",
    "TokenizerFast",
    "TokenizersBackend",
    "ImageProcessor",
    "ImageProcessorPil",
    "FeatureExtractor",
)
_LEFT_OUT = "safety_checker"
_SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
_NO_PARTS: Mapping[str, nn.Module] = {}
_UNCHECKED = {_LEFT_OUT: None, "requires_safety_checker": False}


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder holds one of PIPELINES; False for a pipeline of another class, such as an export of a pixel model."""
    return (folder / "model_index.json").is_file() and read_json_object(folder / "model_index.json").get("_class_name") in PIPELINES


def load_pipeline(
    folder: Path, *, device: torch.device, precision: Precision = "fp32", parts: Mapping[str, nn.Module] = _NO_PARTS
) -> DiffusionPipeline:
    """The pipeline as `from_pretrained` gives it, in fp32 and without a safety checker.

    precision: see `place_parts`; parts: models that stand, as they are, for those of these names.
    Nothing is fetched or unpickled, and no code of the folder is run.
    Raises: ValueError if it is no folder of a pipeline in PIPELINES, or a part is missing, unknown or not safetensors."""
    name, components = _checked_index(folder)
    disable_progress_bar()
    try:
        if any(kind in _MOVED for kind in components.values()):
            pipeline = _assembled(folder, name, components)
        else:
            pipeline = PIPELINES[name].from_pretrained(folder, **_SAFE, **(_UNCHECKED if _LEFT_OUT in components else {}), **parts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: not read as {name}: {error}; copy or export the whole pipeline again") from error
    assert isinstance(pipeline, DiffusionPipeline), "from_pretrained gives an object of the class"
    place_parts(pipeline, device=device, precision=precision, but=list(parts.values()))
    return pipeline


def place_parts(pipeline: DiffusionPipeline, *, device: torch.device, precision: Precision, but: Sequence[object] = ()) -> None:
    """Move a pipeline's models to a device, all but those that are named.

    precision: bf16 for weights held as `hold_in_bf16` does: half the memory, and under autocast the same pictures."""
    for model in pipeline.components.values():
        if not isinstance(model, nn.Module) or any(model is other for other in but):
            continue
        if precision == "bf16":
            # A pipeline makes its noise in the type of a model's first weight, which therefore stays as it is.
            first = next(model.parameters())
            kept = first.data
            hold_in_bf16(model, precision)
            first.data = kept
        model.to(device)


def load_with_decoder(
    folder: Path, other: Path | None = None, *, device: torch.device
) -> tuple[DiffusionPipeline, DiffusionPipeline | None]:
    """What `painter` takes: a pipeline that draws on its own, or a prior's and its decoder's.

    other: the folder of the decoder where `folder` is a prior, or of the prior where it is a decoder; None where it is neither.
    Raises: ValueError if `other` is missing, of another class or of no use."""
    name = _checked_index(folder)[0]
    prior_of = {decoder: prior for prior, decoder in DECODER_OF.items()}
    wanted = DECODER_OF.get(name) or prior_of.get(name)
    if wanted is None:
        if other is not None:
            raise ValueError(f"{folder} is a {name}, which draws on its own; leave {other} out")
        return load_pipeline(folder, device=device), None
    if other is None:
        raise ValueError(f"{folder} is a {name}, which draws together with a {wanted}; give that one's folder, too")
    found = _checked_index(other)[0]
    if found != wanted:
        raise ValueError(f"{other} is a {found}; together with {folder} wanted a {wanted}")
    first, second = load_pipeline(folder, device=device), load_pipeline(other, device=device)
    return (first, second) if name in DECODER_OF else (second, first)


def reads(pipeline: DiffusionPipeline) -> Reads:
    """What the pipeline is told."""
    return "inpainting" if type(pipeline) is StableDiffusionInpaintPipeline else "text"


def _checked_index(folder: Path) -> tuple[str, dict[str, str]]:
    """The pipeline's class, and the class of each part that is there.

    Raises: ValueError as load_pipeline."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"{folder}: no model_index.json there; wanted a folder as `halfstep export` or save_pretrained writes it")
    index = read_json_object(index_file)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise ValueError(f"{index_file}: a {name} does not draw prompts here; wanted one of {', '.join(PIPELINES)}")
    components = {}
    for part, value in index.items():
        if part == _LEFT_OUT:
            components[part] = "none"
        elif not part.startswith("_") and isinstance(value, list) and value != [None, None]:
            components[part] = _checked_part(folder, part, value)
    return name, components


def _assembled(folder: Path, name: str, components: Mapping[str, str]) -> DiffusionPipeline:
    """One of Wuerstchen's two pipelines, its parts loaded one by one."""
    settings = {key: value for key, value in read_json_object(folder / "model_index.json").items() if isinstance(value, int | float)}
    parts: dict[str, object] = {}
    for part, kind in components.items():
        if kind in _MOVED:
            parts[part] = _MOVED[kind].from_pretrained(folder / part, local_files_only=True, use_safetensors=True)
        elif kind == "CLIPTextModel":
            parts[part] = CLIPTextModel.from_pretrained(folder / part, **_SAFE)
        elif kind.endswith("Scheduler"):
            parts[part] = DDPMWuerstchenScheduler.from_pretrained(folder / part, local_files_only=True)
        else:
            parts[part] = AutoTokenizer.from_pretrained(folder / part, local_files_only=True, trust_remote_code=False)
    return PIPELINES[name](**parts, **settings)


def _checked_part(folder: Path, part: str, value: Sequence[object]) -> str:
    """The class of a part that is known, lies in a folder of its own and, if it has weights, has them as safetensors."""
    library, kind = value if len(value) == 2 else (None, None)
    known = isinstance(kind, str) and (kind in _MODELS or kind.endswith(_WITHOUT_WEIGHTS))
    if not known or (library not in ("diffusers", "transformers") and kind not in _MOVED):
        raise ValueError(
            f"{folder / 'model_index.json'}: {part} is {value}; wanted a class of diffusers or transformers that such a pipeline has"
        )
    if not part.isidentifier() or not (folder / part).is_dir():
        raise ValueError(f"{folder}: there is no folder {part}/, which model_index.json names; copy the whole pipeline again")
    if kind in _MODELS:
        weight_files(folder / part)
    assert isinstance(kind, str), "checked above"
    return kind
