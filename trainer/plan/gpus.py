"""Types of GPU: their memory, speed and price, from configs/prices.yaml. Free of torch."""

import difflib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainer.config_io import load_config
from trainer.config_sections import Fraction, Positive, Section

PRICES_FILE = "configs/prices.yaml"


class Gpu(Section):
    """One type of GPU."""

    peak: str
    """Its row among the data sheets' peaks."""
    memory_gib: Positive
    """Memory as the driver shows it, GiB."""
    node_gigabytes_per_second: Positive
    """1e9 bytes a second that a rank sends to others of its node."""
    usd_per_hour: Positive
    """Price of one GPU for an hour, US dollars."""


class Prices(Section):
    """What a plan assumes about hardware and money."""

    date: str
    """When the file was last looked through."""
    utilisation: Annotated[float, Field(gt=0, le=1)]
    """Share of the peak that training gets."""
    reserved_gib: Positive
    """Memory that CUDA and its libraries take, GiB."""
    fragmentation: Fraction
    """Share of the memory that the allocator leaves unused."""
    network_gigabytes_per_second: Positive
    """1e9 bytes a second to other nodes, for each rank of a node: what the node's links carry, by its ranks."""
    node_latency_microseconds: Positive
    """From a rank to the next one of its node, in a collective."""
    network_latency_microseconds: Positive
    """From a node to the next one, in a collective."""
    host_gigabytes_per_second: Positive
    """1e9 bytes a second between a GPU and its host's memory."""
    gpus: Mapping[str, Gpu]
    """Types of GPU by name."""


def load_prices() -> Prices:
    """The table, as edited. Raises: RecipeErrors listing every mistake in it."""
    return load_config(Prices, Path(str(importlib.resources.files("configs"))) / "prices.yaml")


def gpu_named(prices: Prices, name: str) -> tuple[str, Gpu]:
    """A type by its name, or by the beginning of it: a100 is the first one of the table that begins so, the smaller.

    Raises: ValueError naming those that there are."""
    wanted = name.lower().replace("_", "-")
    for known, gpu in prices.gpus.items():
        if known == wanted or known.startswith(f"{wanted}-"):
            return known, gpu
    near = difflib.get_close_matches(wanted, prices.gpus, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"--gpu {name}: not in {PRICES_FILE}{hint} It has {', '.join(prices.gpus)}; add a line there for another one")


def usable_bytes(prices: Prices, gpu: Gpu) -> int:
    """Memory of a GPU that tensors may take."""
    return int((gpu.memory_gib * (1 - prices.fragmentation) - prices.reserved_gib) * 2**30)
