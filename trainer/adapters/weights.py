"""An adapter's numbers apart from the model that it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from trainer.adapters.lora import ADAPTER, adapter_parameters, inject, lora_layers


@final
@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """LoRA or DoRA of one model."""

    rank: int
    alpha: float
    """The product B A is scaled by alpha / rank."""
    dora: bool
    tensors: Mapping[str, Tensor]
    """fp32 by <layer>.lora_A.weight, <layer>.lora_B.weight and, of DoRA, <layer>.lora_magnitude_vector; layers as the plain model's."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers, in order."""
        return tuple(name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight"))


def adapter_weights(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> AdapterWeights:
    """A copy of a model's adapter on the CPU.

    values: tensors to take in the place of the model's own, by the names of its parameters (averages, for one).
    Raises: ValueError if the model has no adapter."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter; add or load one first")
    first = next(iter(layers.values()))
    tensors = {
        stored_name(name): (parameter if values is None else values[name]).detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    return AdapterWeights(rank=first.r[ADAPTER], alpha=first.lora_alpha[ADAPTER], dora=first.use_dora[ADAPTER], tensors=tensors)


def load_adapter(model: nn.Module, weights: AdapterWeights, *, dropout: float = 0.0) -> None:
    """Write an adapter's weights into a model's adapter, which is added first where there is none.

    Raises: ValueError if the layers, rank, alpha, kind or shapes differ."""
    if not lora_layers(model):
        inject(model, rank=weights.rank, alpha=weights.alpha, targets=weights.layers, dora=weights.dora, dropout=dropout)
    own = adapter_weights(model)
    for what, got, wanted in (("rank", weights.rank, own.rank), ("alpha", weights.alpha, own.alpha), ("dora", weights.dora, own.dora)):
        if got != wanted:
            raise ValueError(f"the adapter has {what}={got}, the model's has {what}={wanted}; set the recipe's {what} to {got}")
    differing = sorted(set(own.tensors) ^ set(weights.tensors))
    if differing:
        raise ValueError(f"the adapter and the model's have not the same tensors: {differing[0]} and {len(differing) - 1} others differ")
    parameters = {stored_name(name): parameter for name, parameter in adapter_parameters(model).items()}
    for name, parameter in parameters.items():
        if weights.tensors[name].shape != parameter.shape:
            got, wanted = tuple(weights.tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"the adapter's {name} has shape {got}, the model wants {wanted}; it was made for another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights.tensors[name])


def stored_name(parameter_name: str) -> str:
    """The name in AdapterWeights of an adapter's parameter: without the adapter's own name, and peft's spelling of magnitudes."""
    name = parameter_name.replace(f".{ADAPTER}.", ".")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
