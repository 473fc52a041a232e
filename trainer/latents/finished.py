"""A trained latent model read back: the base and what a run's checkpoint changed of it, in fp32, and the stock pipeline around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel

from data_shards.index import ShardIndex
from trainer.adapters.lora import lora_layers, merge
from trainer.adapters.tokens import fold, new_rows
from trainer.adapters.weights import AdapterWeights, adapter_weights
from trainer.checkpoint import read_tensors
from trainer.config import LatentBaseConfig, LoraAdaptation, RunConfig, StableDiffusionConfig
from trainer.config_io import load_recipe
from trainer.hash import tensors_sha256
from trainer.latents.pipelines import Parts, assemble
from trainer.latents.trained import Trained, build_trained, latent_config
from trainer.manifest import Checkpoint, newest_checkpoint
from trainer.model_card import find_index
from trainer.source import average_part, check_tensors


@final
@dataclass(frozen=True, eq=False)
class Finished:
    """A run's model at its newest checkpoint: averaged weights on the CPU, all in fp32."""

    recipe: RunConfig
    """As it was trained."""
    config: RunConfig
    """The same with frozen parts in fp32."""
    trained: Trained
    path: Path
    checkpoint: Checkpoint
    weights_sha256: str
    """Of the averaged weights that were trained."""
    meaning: Mapping[str, object]
    """What the checkpoint's manifest says of the weights."""
    indexes: tuple[ShardIndex, ...]
    """Of the training data; empty where it is no longer there."""
    image_size: int | None
    """Side in pixels of the training images; None where the recipe does not say and the data is no longer there."""
    token: tuple[str, Float[Tensor, " d"]] | None
    """The token that was taught, and its row."""

    @property
    def is_lora(self) -> bool:
        """Whether an adapter was trained."""
        return isinstance(self.config.adaptation, LoraAdaptation)

    @property
    def network(self) -> nn.Module:
        """The U-Net or prior as diffusers knows it."""
        module = self.trained.module
        return getattr(module, "unet", None) or module.get_submodule("prior")

    @property
    def text_encoder(self) -> CLIPTextModel | None:
        """The text encoder where it, or a token of it, was trained."""
        return getattr(self.trained.module, "text_encoder", None)

    @property
    def network_name(self) -> str:
        """The network's part of the pipeline: unet or prior."""
        return "unet" if hasattr(self.trained.module, "unet") else "prior"

    def adapters(self) -> dict[str, AdapterWeights]:
        """The adapters by the pipeline's part that each belongs to."""
        parts: dict[str, nn.Module] = {self.network_name: self.network}
        if self.text_encoder is not None and lora_layers(self.text_encoder):
            parts["text_encoder"] = self.text_encoder
        return {name: adapter_weights(model) for name, model in parts.items()}


def load_finished(run_dir: Path, *, ema: float | None = None) -> Finished:
    """The averaged weights of a latent run's newest checkpoint in their base. ema: picks an average by its decay; None: the first.

    Raises: ValueError if there is no checkpoint, or recipe, base and checkpoint contradict each other."""
    recipe_path = run_dir / "recipe.yaml"
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(
            f"{run_dir}: no valid checkpoint under checkpoints/; train it first: halfstep train {recipe_path} --run-dir {run_dir}"
        )
    recipe = load_recipe(recipe_path, ())
    latent_config(recipe)
    # Frozen layers are held in bf16 while a run trains; what is handed on has the base's own precision.
    config = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"precision": "fp32"})})
    trained = build_trained(config)
    meaning = checkpoint.manifest.get("descriptor")
    assert isinstance(meaning, dict), "a checkpoint's manifest has one"
    _check_base(run_dir, config, trained, meaning)
    tensors = read_tensors(checkpoint, average_part(checkpoint, ema))
    learnt = {name: parameter for name, parameter in trained.module.named_parameters() if parameter.requires_grad}
    check_tensors(run_dir, tensors, learnt)
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(tensors[name])
    trained.module.requires_grad_(False).eval()
    indexes = find_indexes(config, run_dir)
    return Finished(
        recipe=recipe,
        config=config,
        trained=trained,
        path=run_dir,
        checkpoint=checkpoint,
        weights_sha256=tensors_sha256(tensors),
        meaning=meaning,
        indexes=indexes,
        image_size=config.data.image_size or _common_side(indexes),
        token=_token(config, trained),
    )


def build_pipeline(finished: Finished, *, merged: bool = False) -> DiffusionPipeline:
    """The stock pipeline around a trained network, in fp32 on the CPU. Once only: new tokens become plain ones, in place.

    merged: adapters are folded into the weights. A pipeline of Stable Diffusion whose network is whole draws images of the training
    images' size where it is not told another.
    Raises: ValueError if the base lacks a part, or a merged weight is not finite."""
    network, text_encoder = finished.network, finished.text_encoder
    if text_encoder is not None:
        fold(text_encoder)
    if merged:
        for model in (network, text_encoder):
            if model is not None and lora_layers(model):
                merge(model)
    pipeline = assemble(
        finished.config, network, Parts(text_encoder=text_encoder, tokenizer=finished.trained.tokenizer), device=torch.device("cpu")
    )
    of_stable_diffusion = isinstance(finished.config.model, LatentBaseConfig | StableDiffusionConfig)
    if finished.image_size is not None and of_stable_diffusion and isinstance(network, UNet2DConditionModel):
        network.register_to_config(sample_size=finished.image_size // pipeline.vae_scale_factor)
    return pipeline


def _check_base(run_dir: Path, config: RunConfig, trained: Trained, meaning: Mapping[str, object]) -> None:
    found, wanted = trained.files and trained.files.sha256, meaning.get("base_sha256")
    if found != wanted:
        base = getattr(config.model, "base", "")
        raise ValueError(f"{run_dir}: was trained from a base of sha256 {wanted}, {base} now has {found}; put the base back")


def _token(config: RunConfig, trained: Trained) -> tuple[str, Float[Tensor, " d"]] | None:
    token, text_encoder = config.dreambooth and config.dreambooth.new_token, getattr(trained.module, "text_encoder", None)
    rows = None if text_encoder is None else new_rows(text_encoder)
    return None if not token or rows is None else (token, rows[0].detach().clone())


def find_indexes(config: RunConfig, run_dir: Path) -> tuple[ShardIndex, ...]:
    """Of a recipe's training data, as far as it is there."""
    names: Sequence[str] = [source.shards for source in config.data.mixture] or [config.data.shards or "shards"]
    return tuple(index for name in names if (index := find_index(name, run_dir)) is not None)


def _common_side(indexes: Sequence[ShardIndex]) -> int | None:
    try:
        sides = {index.side() for index in indexes}
    except ValueError:
        return None
    return sides.pop() if len(sides) == 1 else None


def base_name(config: RunConfig) -> tuple[str, str | None]:
    """What a run was trained from, as its recipe says it, and the Hub's revision; of a model from scratch its autoencoder."""
    model = latent_config(config)
    if isinstance(model, LatentBaseConfig):
        return model.autoencoder, None
    return model.base, model.revision
