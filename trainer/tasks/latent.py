"""Latent models: a base fine-tuned, or a small one trained from scratch, in the latents of a frozen autoencoder."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from data_shards import ranks
from data_shards.encoders.check import check_content, check_encoder
from data_shards.encoders.files import file_sha256
from data_shards.reading.sample import MicroBatch
from trainer.config import Kandinsky22DecoderConfig, LatentBaseConfig, LoraAdaptation, RunConfig, WuerstchenPriorConfig
from trainer.config_latent import LatentDenoisingConfig
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar, zero_terminal_snr
from trainer.draws import Draws, LatentDraws, draw, draw_latent
from trainer.engines.precision import autocast, lower_type
from trainer.latents.base import Levels, base_levels, find_part, scheduler_config
from trainer.latents.class_images import ClassImages
from trainer.latents.example import example
from trainer.latents.inputs import Cond, Inputs, build_inputs, drawn_masks, flipped
from trainer.latents.pictures import Pictures, can_draw
from trainer.latents.trained import LatentConfig, Trained, build_trained, latent_config, latent_objective
from trainer.masks import latent_mask
from trainer.models import kandinsky, wuerstchen
from trainer.models.attention import Kernels, use_attention
from trainer.models.dropout import use_logical_dropout
from trainer.models.flops import flops_of, training_forwards
from trainer.models.network import Network
from trainer.objectives.continuous import continuous_denoising_loss
from trainer.objectives.denoising import denoising_loss, offset
from trainer.objectives.inpainting import mask_weight
from trainer.rng import derive_seed
from trainer.tasks.latent_halving import LatentHalving, build_latent_halving, find_teacher
from trainer.tasks.task import Task, Work
from trainer.training_data import TrainingData

logger = logging.getLogger(__name__)

# What stored members must hold, by kind of model and member.
_CONTENTS: Mapping[str, Mapping[str, Mapping[str, Collection[str]]]] = {
    "stable_diffusion": {"text.npy": {"content": ("last_hidden_state, padding not masked",)}, "latents.npy": {"class": ("AutoencoderKL",)}},
    "latent_base": {"latents.npy": {"class": ("AutoencoderKL",)}},
    "wuerstchen_prior": wuerstchen.STORED,
    "kandinsky22_prior": kandinsky.STORED_PRIOR,
    "kandinsky22_decoder": kandinsky.STORED_DECODER,
}
Loss = Callable[[Network, Tensor, Cond, Draws, LatentDraws, Tensor | None], Tensor]
"""(network, x_0, cond, draws, latent draws, masks at the latent's size) -> loss per image."""


@final
@dataclass(frozen=True)
class LatentMeaning:
    """What the weights of a latent run mean: the base that they belong to, and how it was trained."""

    kind: str
    base_sha256: str | None
    """Of the network in its base; None for one from scratch."""
    vae_sha256: str | None
    text_sha256: str | None
    image_sha256: str | None
    prediction: str
    alpha_bar_sha256: str | None
    """None where noise is a function of continuous time."""
    adapter: str
    """full, or the LoRA's numbers."""
    class_images_sha256: str | None = None
    text_2_sha256: str | None = None
    """Of XL's second text encoder."""
    halving: str | None = None
    """Of a student of fewer steps: whose, in how many steps, with what guidance folded in."""

    def to_json(self) -> dict[str, object]:
        """As a manifest holds it; without what says nothing of models that learn from the data alone."""
        return {name: value for name, value in vars(self).items() if name != "halving" or value is not None}


def build_latent_task(config: RunConfig, run_dir: Path, data: TrainingData) -> Task:
    """Join model, encoders and objective. Collective where a large frozen model is shared among the ranks.

    Raises: ValueError where they do not fit each other."""
    trained, device = build_trained(config), ranks.device()
    module = trained.module
    use_logical_dropout(module)
    attention = _use_attention(trained, config)
    if config.train.activation_checkpointing:
        trained.denoiser.checkpoint_activations()
    levels = levels_of(config, trained)
    inputs = build_inputs(config, trained, device=device)
    shape = inputs.latent_shape(data.image_size, data.image_size)
    halving = _halving(config, run_dir, trained, levels)
    loss = _loss(config, levels)
    meaning = _meaning(config, trained, inputs, levels, halving=halving and halving.meaning)
    pictures = Pictures(config, run_dir, trained, inputs, image_size=data.image_size, examples=data.examples)
    check_stored(config, data)

    if not can_draw(config) and config.logging.sample_every_steps and ranks.is_rank_0():
        logger.warning("no pictures are drawn while this prior trains: model.decoder names no decoder; give its folder or Hub id")
    with autocast(config.engine.precision):
        forward = flops_of(module, lambda: example(config, trained, shape))

    empty: Cond = {}  # of the first micro-batch: the same for all

    def micro_batch(batches: Sequence[MicroBatch], step: int, index: int) -> Work:
        parts = [_prepared(config, inputs, batch, step, index, number=number) for number, batch in enumerate(batches)]
        if halving is None:
            return _work(config, loss, parts)
        if not empty and halving.settings.guidance_scale != 1:
            empty.update(_without_text(inputs, batches[0]))
        return _halving_work(config, halving, parts[0], empty)

    return Task(
        module=module,
        units=trained.denoiser.units(),
        micro_batch=micro_batch,
        draw=pictures.draw if can_draw(config) else None,
        descriptor=meaning,
        attention=attention,
        class_images=_class_images(config, run_dir, pictures, data),
        flops_per_image=round((training_forwards(module) + (halving.teacher_forwards if halving else 0)) * forward),
    )


def _class_images(config: RunConfig, run_dir: Path, pictures: Pictures, data: TrainingData) -> ClassImages | None:
    dreambooth = config.dreambooth
    if dreambooth is None or dreambooth.class_prompt is None:
        return None
    return ClassImages(config, dreambooth, run_dir, pictures, image_size=data.image_size)


def levels_of(config: RunConfig, trained: Trained) -> Levels | None:
    """The noise levels of a latent model; None where noise is a function of continuous time.

    Raises: ValueError where the base's own do not allow what the recipe wants."""
    model, objective = latent_config(config), latent_objective(config)
    if isinstance(model, WuerstchenPriorConfig):
        return None
    if isinstance(model, LatentBaseConfig):
        alpha_bar = build_alpha_bar(config.noise_schedule)
        alpha_bar = zero_terminal_snr(alpha_bar) if objective.zero_terminal_snr else alpha_bar
        return Levels(alpha_bar, "v" if objective.prediction == "base" else objective.prediction)
    assert trained.files is not None, "a base has files"
    return base_levels(scheduler_config(trained.files), prediction=objective.prediction, zero_terminal=objective.zero_terminal_snr)


def check_stored(config: RunConfig, data: TrainingData) -> None:
    """Compare what the shards hold of encoders with the recipe's own. Raises: ValueError if another model made it."""
    model = latent_config(config)
    base, revision = getattr(model, "base", None) or getattr(model, "autoencoder", ""), getattr(model, "revision", None)
    parts = {
        "latents.npy": (base, "movq" if isinstance(model, Kandinsky22DecoderConfig) else "vae"),
        "text.npy": (base, "text_encoder"),
        "image.npy": (getattr(model, "image_encoder", None) or getattr(model, "prior", base), "image_encoder"),
    }
    for extension, (name, part) in parts.items():
        if extension in data.fields:
            sha256 = _encoder_sha256(model, name, part, revision=revision if name == base else None)
            for index in data.indexes:
                if sha256 is not None:
                    check_encoder(index, extension, sha256)
                check_content(index, extension, _CONTENTS.get(model.kind, {}).get(extension, {}))


def _encoder_sha256(model: LatentConfig, name: str, part: str, *, revision: str | None) -> str | None:
    """What an encoder of the recipe would note of itself in shards; None for Wuerstchen's image encoder where nothing names it."""
    if Path(name).is_file():
        return file_sha256(Path(name))
    if isinstance(model, WuerstchenPriorConfig) and part == "image_encoder" and model.image_encoder is None:
        pipeline = find_part(name, "prior", revision=revision).root
        if not (pipeline / part / "config.json").is_file():
            return None
    return find_part(name, part, revision=revision).sha256


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """A micro-batch of one data set, encoded."""

    x_0: Tensor
    cond: Cond
    draws: Draws
    latent_draws: LatentDraws
    mask: Tensor | None
    """At the latent's size."""


def _prepared(config: RunConfig, inputs: Inputs, batch: MicroBatch, step: int, index: int, *, number: int) -> _Part:
    """A micro-batch of data set `number`, 1 being class images, on this rank's device."""
    objective = latent_objective(config)
    seed = config.seed if number == 0 else derive_seed(config.seed, "class")
    shape = inputs.shape(batch)
    draws = draw(seed, step, index, shape=shape, micro_batches=config.micro_batches, stratified=objective.stratified)
    latent_draws = draw_latent(
        seed,
        step,
        index,
        shape=shape,
        posterior=inputs.has_posterior,
        perturbed=objective.input_perturbation > 0,
        caption_dropout=objective.caption_dropout,
    )
    batch = replace(batch, captions=_prompts(config, batch, number=number))
    side = batch.images.shape[-1] // shape[-1] if batch.images.numel() else 1
    masks = drawn_masks(config, batch, step, side=side)
    if batch.images.numel():
        batch = replace(batch, images=ranks.to_device(batch.images))
        if config.data.horizontal_flip:
            batch = replace(batch, images=flipped(batch.images, ranks.to_device(draws.flips)))
            if masks is not None:
                masks = flipped(masks, draws.flips)
    x_0, cond = inputs.encode(batch, latent_draws, masks)
    return _Part(x_0.float(), cond, draws, latent_draws, None if masks is None else ranks.to_device(latent_mask(masks, side)))


def _prompts(config: RunConfig, batch: MicroBatch, *, number: int) -> tuple[str | None, ...]:
    dreambooth = config.dreambooth
    if dreambooth is not None and number == 1:
        return (dreambooth.class_prompt,) * len(batch.keys)
    if dreambooth is not None and dreambooth.instance_prompt is not None:
        return (dreambooth.instance_prompt,) * len(batch.keys)
    return batch.captions


def _work(config: RunConfig, loss: Loss, parts: Sequence[_Part]) -> Work:
    """One forward pass of all parts; the loss of an image is its own and, weighted, that of the class image beside it."""
    [first, *_] = parts
    digest = first.draws.sha256()
    if len(parts) == 1:
        return Work(lambda network: loss(network, first.x_0, first.cond, first.draws, first.latent_draws, first.mask), digest)
    assert config.dreambooth is not None, "class images are DreamBooth's"
    weight, count = config.dreambooth.prior_weight, len(first.x_0)
    x_0 = torch.cat([part.x_0 for part in parts])
    cond = {name: torch.cat([part.cond[name] for part in parts]) for name in first.cond}
    draws, latent_draws = _joined([part.draws for part in parts]), _joined_latent([part.latent_draws for part in parts])
    masks = [part.mask for part in parts if part.mask is not None]

    def both(network: Network) -> Tensor:
        losses = loss(network, x_0, cond, draws, latent_draws, torch.cat(masks) if masks else None)
        return losses[:count] + weight * losses[count:]

    return Work(both, digest)


def _loss(config: RunConfig, levels: Levels | None) -> Loss:
    objective = latent_objective(config)
    alpha_bar = None if levels is None else levels.alpha_bar.to(ranks.device())

    def loss(network: Network, x_0: Tensor, cond: Cond, draws: Draws, latent_draws: LatentDraws, mask: Tensor | None) -> Tensor:
        noise, uniforms = ranks.to_device(draws.noise), ranks.to_device(draws.uniforms)
        if objective.offset_noise:
            noise = offset(noise, ranks.to_device(draws.channel_noise), objective.offset_noise)
        perturbation = _perturbation(objective, latent_draws)

        def denoiser(x_t: Tensor, timestep: Tensor) -> Tensor:
            return network(x_t, timestep, cond)[:, : x_0.shape[1]]  # Kandinsky's decoder puts out a variance, too

        if levels is None or alpha_bar is None:
            return continuous_denoising_loss(
                denoiser,
                x_0,
                noise=noise,
                uniforms=uniforms,
                loss=objective.loss,
                min_snr_gamma=objective.min_snr_gamma,
                input_perturbation=perturbation,
            )
        return denoising_loss(
            denoiser,
            x_0,
            noise=noise,
            uniforms=uniforms,
            alpha_bar=alpha_bar,
            prediction=levels.prediction,
            loss=objective.loss,
            min_snr_gamma=objective.min_snr_gamma,
            input_perturbation=perturbation,
            weight_map=_weight_map(objective, mask),
        )

    return loss


def _halving(config: RunConfig, run_dir: Path, trained: Trained, levels: Levels | None) -> LatentHalving | None:
    settings = latent_objective(config).halving
    if settings is None:
        return None
    teacher = find_teacher(settings, run_dir)
    teacher_levels = levels_of(teacher.config, teacher.trained)
    assert levels is not None and teacher_levels is not None, "the recipe's own check: text-to-image models have levels"
    return build_latent_halving(config, settings, trained, levels, teacher=teacher, teacher_levels=teacher_levels)


def _without_text(inputs: Inputs, batch: MicroBatch) -> Cond:
    """The conditioning of the first sample of a micro-batch with no caption."""
    assert inputs.prompts is not None, "the recipe's own check: text-to-image models have prompts"
    first = replace(
        batch,
        images=batch.images[:1],
        keys=batch.keys[:1],
        captions=batch.captions[:1] or (None,),
        tensors={name: tensor[:1] for name, tensor in batch.tensors.items()},
    )
    return inputs.prompts(first, torch.ones(1, dtype=torch.bool))


def _halving_work(config: RunConfig, halving: LatentHalving, part: _Part, empty: Cond) -> Work:
    """A micro-batch's work for a student of a latent teacher. empty: as `_without_text` makes it; not asked for without guidance."""
    strength = latent_objective(config).offset_noise

    def loss(network: Network) -> Tensor:
        noise, uniforms = ranks.to_device(part.draws.noise), ranks.to_device(part.draws.uniforms)
        if strength:
            noise = offset(noise, ranks.to_device(part.draws.channel_noise), strength)

        def student(x_t: Tensor, timestep: Tensor) -> Tensor:
            return network(x_t, timestep, part.cond)

        return halving.loss(student, part.x_0, noise=noise, uniforms=uniforms, cond=part.cond, empty=empty)

    return Work(loss, part.draws.sha256())


def _perturbation(objective: LatentDenoisingConfig, draws: LatentDraws) -> Tensor | None:
    return None if draws.perturbation is None else objective.input_perturbation * ranks.to_device(draws.perturbation)


def _weight_map(objective: LatentDenoisingConfig, mask: Tensor | None) -> Tensor | None:
    weight = 1.0 if objective.inpainting is None else objective.inpainting.weight
    return None if mask is None or weight == 1.0 else mask_weight(mask, inside=weight)


def _joined(draws: Sequence[Draws]) -> Draws:
    return Draws(*(torch.cat([getattr(part, name) for part in draws]) for name in ("noise", "channel_noise", "uniforms", "flips")))


def _joined_latent(draws: Sequence[LatentDraws]) -> LatentDraws:
    perturbations = [part.perturbation for part in draws if part.perturbation is not None]
    dropped = torch.cat([part.caption_dropped for part in draws])
    return LatentDraws(None, torch.cat(perturbations) if perturbations else None, dropped)


def _use_attention(trained: Trained, config: RunConfig) -> Kernels:
    dtype = lower_type(config.engine.precision)
    return use_attention(trained.network, config.engine.attention, ranks.device(), **({} if dtype is None else {"dtype": dtype}))


def _meaning(config: RunConfig, trained: Trained, inputs: Inputs, levels: Levels | None, *, halving: str | None) -> LatentMeaning:
    def digest(encoder: object) -> str | None:
        sha256 = encoder.to_json().get("sha256") if encoder is not None else None  # type: ignore[attr-defined]
        return sha256 if isinstance(sha256, str) else None

    adaptation = config.adaptation
    lora = isinstance(adaptation, LoraAdaptation)
    return LatentMeaning(
        kind=config.model.kind,
        base_sha256=trained.files and trained.files.sha256,
        vae_sha256=digest(inputs.vae),
        text_sha256=digest(inputs.text),
        image_sha256=digest(inputs.image),
        prediction="eps" if levels is None else levels.prediction,
        alpha_bar_sha256=levels and alpha_bar_sha256(levels.alpha_bar),
        adapter=f"lora of rank {adaptation.rank}, alpha {adaptation.alpha or adaptation.rank}" if lora else "full",
        text_2_sha256=digest(inputs.text_2),
        halving=halving,
    )
