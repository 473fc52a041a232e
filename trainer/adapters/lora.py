"""LoRA and DoRA by peft: added to a diffusers or transformers model, switched off for a while, folded into its weights."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of the only adapter, the last but one part of its parameters' names: to_q.lora_A.default.weight."""

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Of diffusers' attention: Stable Diffusion, Wuerstchen's prior (which has no add_k_proj, whatever its script lists), Kandinsky's prior."""
ADDED_ATTENTION_TARGETS = (*ATTENTION_TARGETS, "add_k_proj", "add_v_proj")
"""Of attention to added keys and values: Kandinsky's decoder."""
CLIP_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Of CLIP's text encoder."""

_SHOWN = 12


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    generator: torch.Generator,
    dora: bool = False,
    dropout: float = 0.0,
) -> None:
    """Freeze a model and add trainable fp32 matrices A and B to its `targets`: W x + alpha / rank * B A x.

    targets: ends of module names, each a linear layer or a convolution. alpha: rank * scale; equal to the rank for a scale of 1.
    generator: on the CPU; draws A with a deviation of 1 / rank, in the order of the modules, whatever their device and precision.
    B is zero, so that the model's function does not change. New tokens are added after this: it freezes all that is there.
    Raises: ValueError if a number is out of range, a target matches nothing or cannot be adapted, or there is an adapter already.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; dora: Liu et al. 2024, arXiv:2402.09353, equation 5."""
    inject(model, rank=rank, alpha=alpha, targets=targets, dora=dora, dropout=dropout)
    for layer in lora_layers(model).values():
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        drawn = torch.empty(_weight(down).shape, dtype=torch.float32).normal_(std=1 / rank, generator=generator)
        down.weight = nn.Parameter(drawn.to(_weight(down).device))
        up.weight = nn.Parameter(torch.zeros_like(_weight(up)))


def inject(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], dora: bool, dropout: float) -> None:
    """add_lora without numbers: A and B are to be filled in; DoRA's magnitudes are the norms of the weights.

    Raises: ValueError as add_lora does."""
    _check(model, rank=rank, alpha=alpha, targets=targets, dora=dora, dropout=dropout)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (peft divides it, a fraction is fine)
        target_modules=list(targets),
        use_dora=dora,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws weights that add_lora replaces: the default generator must not move
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, layer in lora_layers(model).items():
        model.get_submodule(name).train(layer.get_base_layer().training)  # peft's parts start in training mode, whatever the model's is
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            part.weight = nn.Parameter(_weight(part).detach().float())
        if dora:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            norms = _row_norms(_weight(layer.get_base_layer()).detach().float())
            magnitude.weight = nn.Parameter(norms.view_as(_weight(magnitude)))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the name that the layer has in the model without an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter trains, by parameter name, in the model's order; empty without one."""
    marks = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.", f".lora_magnitude_vector.{ADAPTER}.")
    return {name: parameter for name, parameter in model.named_parameters() if any(mark in name for mark in marks)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """For as long as the context lasts the model is its base. Parameters and their requires_grad stay as they are."""
    layers = list(lora_layers(model).values())
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            # peft's enable_adapters(False) would freeze the adapter too, under the engines' feet.
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def merge(model: nn.Module) -> None:
    """Fold the adapter into the weights, kept in their own precision, and take peft's layers out: names are plain again.

    All products are computed before the first weight changes: on an error the model is as it was.
    Raises: ValueError if there is no adapter or a merged weight is not finite."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter to merge; add or load one first")
    merged: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = merged_weight(layer)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: the merged weight is not finite; the adapter is broken, take an earlier checkpoint")
        merged[name] = weight.to(_weight(layer.get_base_layer()).dtype)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        _weight(base).data = merged[name]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)
    del model.peft_config


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> Tensor:
    """The weight of a plain layer that computes what an adapted one does without dropout; fp32.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024, arXiv:2402.09353, equation 5."""
    down, up = _weight(layer.lora_A[ADAPTER]).float(), _weight(layer.lora_B[ADAPTER]).float()
    base = _weight(layer.get_base_layer()).float()
    weight = base + layer.scaling[ADAPTER] * (up.flatten(1) @ down.flatten(1)).view_as(base)
    if not layer.use_dora[ADAPTER]:
        return weight
    scale = _weight(layer.lora_magnitude_vector[ADAPTER]).float().flatten() / _row_norms(weight)
    return weight * scale.view(-1, *(1 for _ in base.shape[1:]))


def _weight(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _check(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], dora: bool, dropout: float) -> None:
    kind = type(model).__name__
    if lora_layers(model):
        raise ValueError(f"{kind} has an adapter already; merge it first")
    if rank < 1 or not 0 < alpha < float("inf") or not 0 <= dropout < 1:
        raise ValueError(f"rank={rank}, alpha={alpha}, dropout={dropout}: wanted a rank from 1, an alpha above 0, a dropout in [0, 1)")
    if not targets:
        raise ValueError(f"no LoRA targets for {kind}; name some of {', '.join(_adaptable(model)[:_SHOWN])}")
    for target in targets:
        matches = {name: module for name, module in model.named_modules() if name == target or name.endswith(f".{target}")}
        if not matches:
            known = _adaptable(model)
            near = difflib.get_close_matches(target, known, n=3)
            shown = [*near, *(name for name in known if name not in near)][:_SHOWN]
            raise ValueError(f"LoRA target {target!r} matches no module of {kind}; it has {', '.join(shown)}")
        for name, module in matches.items():
            if not _can_adapt(module):
                raise ValueError(
                    f"LoRA target {target!r} matches {name}, a {type(module).__name__}; wanted linear layers or convolutions, "
                    f"such as {', '.join(_adaptable(model)[:_SHOWN])}"
                )
            if dora and not _weight(module).is_meta and not bool(_row_norms(_weight(module).detach().float()).all()):
                raise ValueError(f"{name} has a row of zeros, and DoRA divides by its norm; take LoRA, or other targets than {target!r}")


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _adaptable(model: nn.Module) -> list[str]:
    """Ends of the names of a model's layers that can be targets, each once: to_q, to_out.0."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if _can_adapt(module):
            parts = name.split(".")
            found[".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]] = None
    return list(found)
