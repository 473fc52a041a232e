"""LoRA files: diffusers' form and kohya's, written from an adapter's weights and read back to them.

How stock diffusers 0.42 takes them:
- StableDiffusionPipeline and its kin: `pipeline.load_lora_weights(folder)`, parts "unet" and "text_encoder"; either form.
- WuerstchenPriorPipeline: the same, parts "prior" and "text_encoder"; diffusers' form.
- Kandinsky 2.2, whose pipelines have no loader: `pipeline.prior.load_lora_adapter(folder, prefix="prior", weight_name=FILE_NAME)` and
  `pipeline.unet.load_lora_adapter(folder, prefix="unet", weight_name=FILE_NAME)`; or the merged weights.
- DoRA in kohya's form loses its magnitudes there (it says so); ComfyUI and kohya's tools read them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data_shards.files import replace_file
from trainer.adapters.weights import AdapterWeights

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that load_lora_weights looks for in a folder."""
METADATA_KEY = "lora_adapter_metadata"
"""Of the header that diffusers (since 0.34) takes rank and alpha from; without it alpha is taken to be the rank."""

_MAGNITUDE = ".lora_magnitude_vector"
_TEXT_PARTS = ("text_encoder", "text_encoder_2")
_KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
_KOHYA_TO_PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
_SCRIPTS_TO_PEFT = {
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",
    ".lora_linear_layer.up.weight": ".lora_B.weight",
    ".lora_magnitude_vector.weight": ".lora_magnitude_vector",
}


def write_diffusers(folder: Path, parts: Mapping[str, AdapterWeights]) -> Path:
    """Write diffusers' form to FILE_NAME in a folder, whole or not at all; returns the file.

    parts: by the model's name in the pipeline: unet, prior, text_encoder.
    Raises: ValueError if there is none."""
    _check_parts(parts)
    tensors: dict[str, Tensor] = {}
    header: dict[str, object] = {}
    for part, weights in parts.items():
        for name, tensor in weights.tensors.items():
            # Older transformers call CLIP's layers text_model.encoder...; diffusers drops that where it is not wanted.
            inner = name if part not in _TEXT_PARTS or name.startswith("text_model.") else f"text_model.{name}"
            # The loader of transformers wants peft's full name of magnitudes, that of peft the short one.
            full = part in _TEXT_PARTS and inner.endswith(_MAGNITUDE)
            tensors[f"{part}.{inner}.weight" if full else f"{part}.{inner}"] = tensor.contiguous()
        header |= {
            f"{part}.r": weights.rank,
            f"{part}.lora_alpha": _number(weights.alpha),
            f"{part}.use_dora": weights.dora,
            f"{part}.target_modules": sorted({_suffix(layer) for layer in weights.layers}),
        }
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)}
    replace_file(folder / FILE_NAME, save(tensors, metadata))
    return folder / FILE_NAME


def write_kohya(path: Path, parts: Mapping[str, AdapterWeights]) -> Path:
    """Write kohya's form: lora_unet_..., lora_te_... (lora_te1_ and lora_te2_ where there are two), each layer with its alpha.

    Raises: ValueError for other parts, or for layers that the form's readers would take for others."""
    _check_parts(parts)
    tensors: dict[str, Tensor] = {}
    for part, weights in parts.items():
        if part not in _KOHYA_PREFIXES:
            raise ValueError(f"kohya's form has no name for {part!r}, only for {', '.join(_KOHYA_PREFIXES)}; write diffusers' form")
        prefix = _KOHYA_PREFIXES[part]["text_encoder_2" in parts and part == "text_encoder"]
        for layer in weights.layers:
            if layer.endswith(("add_k_proj", "add_v_proj")):
                raise ValueError(f"kohya's form has no {layer}; write diffusers' form or the merged weights")
            inner = layer if part == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
            key = prefix + inner.replace(".", "_")
            for ours, theirs in zip(_KOHYA_TO_PEFT.values(), _KOHYA_TO_PEFT, strict=True):
                tensor = weights.tensors.get(f"{layer}.{ours}")
                if tensor is not None:
                    # A column: the norms of rows of the weight, as ComfyUI and LyCORIS tell from the shape.
                    column = (-1, *(1 for _ in weights.tensors[f"{layer}.lora_A.weight"].shape[1:]))
                    tensors[f"{key}.{theirs}"] = (tensor.view(column) if theirs == "dora_scale" else tensor).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(weights.alpha))
    shown = next(iter(parts.values()))
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(shown.rank),
        "ss_network_alpha": str(_number(shown.alpha)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(tensors, metadata))
    return path


def read_lora(path: Path, models: Mapping[str, nn.Module]) -> dict[str, AdapterWeights]:
    """The adapters in a file of either form, in fp32, for those models that the file has an adapter for.

    path: the file, or a folder with FILE_NAME. models: by name of the part, with or without an adapter; they tell the layers' names.
    A layer's alpha is the file's, or the rank where it has none, as in the files of diffusers' scripts.
    Raises: ValueError naming the file if it is no such file, or has layers that the models do not have or of several ranks."""
    path = path / FILE_NAME if path.is_dir() else path
    tensors, header = _read(path)
    layers = {part: _layer_names(model) for part, model in models.items()}
    found: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for key, tensor in tensors.items():
        part, layer, kind = _kohya_key(key, layers) if key.startswith("lora_") else _diffusers_key(key, layers)
        if layer is None:
            raise ValueError(f"{path}: {key} belongs to no layer of {', '.join(models)}; the file is of another model or form")
        if kind == "alpha":
            alphas.setdefault(part, {})[layer] = float(tensor)
        else:
            found.setdefault(part, {})[f"{layer}.{kind}"] = tensor.float()
    if not found:
        raise ValueError(f"{path}: has no adapter")
    return {
        part: _weights(f"{path}: the {part}", found[part], alphas.get(part, {}), _of_part(header, part), models[part])
        for part in models
        if part in found
    }


def _weights(
    where: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], header: Mapping[str, object], model: nn.Module
) -> AdapterWeights:
    """One model's tensors, complete and in the order of its layers."""
    layers = [name for name, _ in model.named_modules() if f"{name}.lora_A.weight" in tensors]
    dora = any(name.endswith(_MAGNITUDE) for name in tensors)
    kinds = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if dora else ()))
    ordered = {f"{layer}.{kind}": tensors.get(f"{layer}.{kind}") for layer in layers for kind in kinds}
    for name in (*ordered, *tensors):
        if ordered.get(name) is None:
            raise ValueError(f"{where}'s {name} is missing or alone; wanted {', '.join(kinds)} of each layer")
    complete = {name: _in_peft_shape(name, tensors) for name in ordered}
    ranks = {tensors[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    rank = min(ranks)
    found = _header_alpha(header, rank) if alphas == {} else {alphas.get(layer, float(rank)) for layer in layers}
    if len(ranks) != 1 or len(found) != 1 or header.get("rank_pattern") or header.get("alpha_pattern"):
        raise ValueError(f"{where}'s layers have the ranks {sorted(ranks)} and alphas {sorted(found)}, or patterns; wanted one of each")
    return AdapterWeights(rank=rank, alpha=found.pop(), dora=dora, tensors=complete)


def _header_alpha(header: Mapping[str, object], rank: int) -> set[float]:
    alpha = header.get("lora_alpha")
    if not isinstance(alpha, int | float):
        return {float(rank)}
    # Rank-stabilised LoRA (arXiv:2312.03732) scales by alpha / sqrt(rank).
    return {float(alpha) * rank**0.5 if header.get("use_rslora") else float(alpha)}


def _in_peft_shape(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Magnitudes are a column in kohya's form, and flat, or in a convolution's channels, in peft's."""
    layer, found, _ = name.partition(_MAGNITUDE)
    if not found:
        return tensors[name]
    return tensors[name].view(-1) if tensors[f"{layer}.lora_A.weight"].ndim == 2 else tensors[name].view(1, -1, 1, 1)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted a LoRA in safetensors, or a folder with {FILE_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
        header = json.loads(text)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a LoRA in safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header's {METADATA_KEY} is not a JSON object")
    return tensors, header


def _of_part(header: Mapping[str, object], part: str) -> dict[str, object]:
    return {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}


def _layer_names(model: nn.Module) -> dict[str, str]:
    """A model's layers by their names, and by those with the underscores that kohya writes for dots: only the model tells them apart."""
    names = [name for name, _ in model.named_modules()]
    return {name.replace(".", "_"): name for name in names} | {name: name for name in names}


def _kohya_key(key: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str | None, str]:
    """Part, layer (None: the models have none of that name) and kind of tensor."""
    stem, _, kind = key.partition(".")
    for part, prefixes in _KOHYA_PREFIXES.items():
        for prefix in prefixes:
            if stem.startswith(prefix):
                return part, _known(stem.removeprefix(prefix), layers.get(part, {}), dropped="text_model_"), _KOHYA_TO_PEFT.get(kind, kind)
    return "", None, kind


def _diffusers_key(key: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str | None, str]:
    """The same of a key of diffusers' form, today's or that of its scripts."""
    for theirs, ours in _SCRIPTS_TO_PEFT.items():
        key = key.replace(theirs, ours)
    part, _, rest = key.partition(".")
    layer, _, kind = rest.partition(".lora_")
    return part, _known(layer, layers.get(part, {}), dropped="text_model."), f"lora_{kind}"


def _known(name: str, layers: Mapping[str, str], *, dropped: str) -> str | None:
    return layers.get(name) or layers.get(name.removeprefix(dropped))


def _suffix(layer: str) -> str:
    """The end of a layer's name that tells its kind: to_q, to_out.0."""
    parts = layer.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _check_parts(parts: Iterable[str]) -> None:
    if not list(parts):
        raise ValueError("no adapter to write; wanted one of a unet, a prior or a text_encoder")
