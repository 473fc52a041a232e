"""What a mistaken key or value was probably meant to be."""

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic.fields import FieldInfo

from trainer.config_sections import Section
from trainer.strict_yaml import KeyPath, Plain

# What other trainers and papers call a key -> ours.
_OTHER_NAMES = {
    "accumulation": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "train_batch_size": "data.global_batch_size",
    "batch_size": "data.global_batch_size",
    "batch": "data.global_batch_size",
    "num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "dataset": "data.shards",
    "dataset_name": "data.shards",
    "path": "data.shards",
    "random_flip": "data.horizontal_flip",
    "resolution": "data.faces.size",
    "image_size": "data.faces.size",
    "width": "model.channels",
    "block_out_channels": "model.channels",
    "ch_mult": "model.channels",
    "num_heads": "model.attention_heads",
    "heads": "model.attention_heads",
    "norm_num_groups": "model.norm_groups",
    "prediction_type": "objective.prediction",
    "parameterization": "objective.prediction",
    "loss_type": "objective.loss",
    "noise_offset": "objective.offset_noise",
    "snr_gamma": "objective.min_snr_gamma",
    "beta_schedule": "noise_schedule.kind",
    "timesteps": "noise_schedule.steps",
    "num_train_timesteps": "noise_schedule.steps",
    "diffusion_steps": "noise_schedule.steps",
    "diffusion": "noise_schedule",
    "optimizer": "optim",
    "lr": "learning_rate",
    "rate": "learning_rate",
    "epsilon": "eps",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "grad_clip": "optim.max_gradient_norm",
    "clip": "optim.max_gradient_norm",
    "max_grad_norm": "optim.max_gradient_norm",
    "clip_grad_norm": "optim.max_gradient_norm",
    "scheduler": "lr_schedule",
    "lr_scheduler": "lr_schedule",
    "warmup": "lr_schedule.warmup_steps",
    "lr_warmup_steps": "lr_schedule.warmup_steps",
    "ema_decay": "ema.decay",
    "use_ema": "ema.decay",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "num_train_steps": "train.steps",
    "total_steps": "train.steps",
    "iterations": "train.steps",
    "num_iters": "train.steps",
    "epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "torch_compile": "train.compile",
    "mixed_precision": "engine.precision",
    "dtype": "engine.precision",
    "amp": "engine.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "zero_optimization": "engine.zero_stage",
    "stage": "engine.zero_stage",
    "backend": "engine.kind",
    "strategy": "engine.kind",
    "checkpointing_steps": "checkpoint.every_steps",
    "save_every": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_every_steps": "checkpoint.every_steps",
    "checkpoints_total_limit": "checkpoint.keep_last",
    "save_total_limit": "checkpoint.keep_last",
    "log_every": "logging.every_steps",
    "logging_steps": "logging.every_steps",
    "validation_steps": "logging.sample_every_steps",
    "network": "model",
    "unet": "model",
    "training": "train",
    "trainer": "train",
    "distillation": "distill",
    "iters": "distill.updates",
    "num_updates": "distill.updates",
    "random_seed": "seed",
    "manual_seed": "seed",
}

_OTHER_VALUES = {
    "epsilon": "eps",
    "noise": "eps",
    "v_prediction": "v",
    "velocity": "v",
    "sample": "x_0",
    "x0": "x_0",
    "squaredcos_cap_v2": "cosine",
    "trained_betas": "given",
    "bfloat16": "bf16",
    "float32": "fp32",
    "full": "fp32",
    "no": "fp32",
    "l2": "mse",
    "min_snr_gamma": "min_snr",
    "ddpm": "ancestral",
    "salimans_ho": "ddim",
    "ddp": "replicated",
    "fsdp2": "fsdp",
    "zero": "deepspeed",
    "float16": "fp16",
    "native": "sdpa",
    "xformers_attention": "xformers",
    "distillation": "progressive_distillation",
    "step": "step_decay",
    "polynomial": "linear",
    "nhwc": "channels_last",
}


def near_value(got: str, allowed: list[str]) -> str | None:
    """The allowed word that was probably meant."""
    word = got.lower().replace("-", "_").replace(" ", "_")
    for candidate in (word, _OTHER_VALUES.get(word)):
        if candidate in allowed:
            return candidate
    return next(iter(difflib.get_close_matches(word, allowed, 1, 0.5)), None)


def unknown_key(root: type[Section], tree: Plain, path: KeyPath, *, prefix: str = "", others: Sequence[type[Section]] = ()) -> str:
    """What to say of a key that its section does not have; `prefix` stands before the key that it suggests.

    others: what the whole file might have been instead."""
    *parents, name = (str(part) for part in path)
    section = section_at(root, tree, tuple(parents))
    if kinds := [
        str(other.model_fields["kind"].default)
        for other in (_other_kinds(root, tuple(parents)) if parents else others)
        if name in other.model_fields
    ]:
        return f"unknown key; it belongs to {prefix if not parents else ''}{'.'.join([*parents, 'kind'])}={' or '.join(kinds)}"
    near = _near_key(root, tree, parents, name)
    if near:
        return f"unknown key - did you mean '{prefix}{near}'?"
    where = ".".join(parents) if section and parents else "the file"
    return f"unknown key; {where} has {', '.join((section or root).model_fields)}"


def _near_key(root: type[Section], tree: Plain, parents: list[str], name: str) -> str | None:
    every = list(_keys(root, tree, ""))
    prefix = ".".join([*parents, ""])
    here = [key.removeprefix(prefix) for key in every if key.startswith(prefix)]
    leaves: dict[str, str] = {}
    for key in every:
        leaves.setdefault(key.rpartition(".")[2], key)
    word = name.lower().replace("-", "_")
    other = _OTHER_NAMES.get(word, "")
    if word in here:
        return prefix + word
    if other.rpartition(".")[2] in here:
        return prefix + other.rpartition(".")[2]
    if other in every:
        return other
    if near := difflib.get_close_matches(word, here, 1, 0.65):
        return prefix + near[0]
    if len(word) > 3 and (longer := [key for key in here if word in key]):
        return prefix + longer[0]
    for leaf in (word, other):
        if leaf in leaves:
            return leaves[leaf]
    return next((leaves[near] for near in difflib.get_close_matches(word, leaves, 1, 0.75)), None)


def section_at(root: type[Section], tree: Plain, path: KeyPath) -> type[Section] | None:
    """The model of the section at a path; where the recipe chooses a kind, that kind's."""
    section = root
    for part in path:
        field = section.model_fields.get(str(part))
        tree = tree.get(str(part)) if isinstance(tree, dict) else None
        chosen = _chosen(field, tree) if field else None
        if chosen is None:
            return None
        section = chosen
    return section


def field_at(root: type[Section], tree: Plain, path: KeyPath) -> FieldInfo | None:
    """The field at a path, or None if there is none."""
    path = tuple(part for part in path if isinstance(part, str))  # a list's items are of the list's field
    section = section_at(root, tree, path[:-1])
    return section.model_fields.get(str(path[-1])) if section and path else None


def _chosen(field: FieldInfo, tree: Plain) -> type[Section] | None:
    sections = _sections(field.annotation)
    kind = tree.get("kind") if isinstance(tree, dict) else None
    for section in sections:
        if kind is not None and "kind" in section.model_fields and section.model_fields["kind"].default == kind:
            return section
    if isinstance(field.default, Section):
        return type(field.default)
    return sections[0] if sections else None


def _sections(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _other_kinds(root: type[Section], path: KeyPath) -> list[type[Section]]:
    field = field_at(root, None, path) if path else None
    return [section for section in _sections(field.annotation) if "kind" in section.model_fields] if field else []


def _keys(section: type[Section], tree: Plain, prefix: str) -> Iterator[str]:
    """Every dotted key that a recipe of these kinds may set."""
    for name, field in section.model_fields.items():
        yield prefix + name
        below = tree.get(name) if isinstance(tree, dict) else None
        inner = _chosen(field, below)
        if inner:
            yield from _keys(inner, below, f"{prefix}{name}.")
