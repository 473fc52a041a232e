"""A LoRA file put on a stock pipeline by the pipeline's own loader."""

from pathlib import Path

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from trainer.models.deprecated import KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer, WuerstchenPriorPipeline

FILE_NAME = "pytorch_lora_weights.safetensors"
_ADAPTER = "lora"


def apply_lora(pipeline: DiffusionPipeline, path: Path, *, scale: float = 1.0) -> None:
    """Load a LoRA in diffusers' or kohya's keys into the pipeline; its product counts `scale` times.

    path: a .safetensors file, or a folder with one.
    Raises: ValueError if there is none, or it is for another model."""
    file = lora_file(path)
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not read as safetensors: {error}; give a LoRA's file") from error
    try:
        adapted = _load(pipeline, file)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file} does not fit {_described(pipeline)}: {error}; give the base that it was trained on") from error
    if not adapted:
        example = f", such as {names[0]}" if names else ""
        raise ValueError(f"{file} has {len(names)} tensors{example}, none of them for {_described(pipeline)}; give a LoRA of that model")
    for model in adapted:
        _scale(model, scale)


def lora_file(path: Path) -> Path:
    """The file itself, or of a folder pytorch_lora_weights.safetensors or the only .safetensors in it.

    Raises: ValueError if there is no such file, or the folder has several."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        wrong = "is not a .safetensors file" if path.is_file() else "not there"
        raise ValueError(f"{path}: {wrong}; wanted a LoRA's .safetensors file, or a folder with {FILE_NAME}")
    found = sorted(path.glob("*.safetensors"))
    if path / FILE_NAME in found:
        return path / FILE_NAME
    if len(found) != 1:
        what = "no .safetensors file" if not found else f"{len(found)} .safetensors files and no {FILE_NAME}"
        raise ValueError(f"{path}: {what} there; name the file")
    return found[0]


def _load(pipeline: DiffusionPipeline, file: Path) -> list[nn.Module]:
    """The parts of the pipeline that the file has an adapter for, with it."""
    match pipeline:
        case StableDiffusionPipeline() | StableDiffusionInpaintPipeline() | StableDiffusionXLPipeline() | WuerstchenPriorPipeline():
            pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=_ADAPTER, local_files_only=True, use_safetensors=True
            )
            parts = [getattr(pipeline, part) for part, adapters in pipeline.get_list_adapters().items() if _ADAPTER in adapters]
            return [part for part in parts if isinstance(part, nn.Module)]
        case KandinskyV22PriorPipeline():
            return _load_into(pipeline.prior, "prior", file)
        case KandinskyV22Pipeline():
            return _load_into(pipeline.unet, "unet", file)
    raise ValueError("no LoRA can be put on such a pipeline")


def _load_into(model: PriorTransformer | UNet2DConditionModel, prefix: str, file: Path) -> list[nn.Module]:
    """Kandinsky's pipelines have no loader of their own, their networks have."""
    model.load_lora_adapter(  # pyright: ignore[reportCallIssue] (nn.Module hides the class's other methods)
        str(file.parent), prefix=prefix, weight_name=file.name, adapter_name=_ADAPTER, local_files_only=True, use_safetensors=True
    )
    return [model] if _ADAPTER in getattr(model, "peft_config", {}) else []


def _scale(model: nn.Module, scale: float) -> None:
    """A pipeline's own set_adapters knows neither Wuerstchen's prior nor Kandinsky's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(_ADAPTER, scale)


def _described(pipeline: DiffusionPipeline) -> str:
    return f"the {type(pipeline).__name__} it is to be put on"
