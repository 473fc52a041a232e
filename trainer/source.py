"""What a model can be loaded from: a run, a chain, an export or a stock pipeline, with the descriptor that says what its weights mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from data_shards.files import content_record, read_json_object
from trainer.chain import ChainStage, read_chain
from trainer.checkpoint import read_tensors
from trainer.config import DdpmConfig, DenoisingConfig, PixelModelConfig, RunConfig, TinyUNetConfig, pixel_objective
from trainer.config_io import load_recipe
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.engines.frozen import hold_weights_in
from trainer.engines.precision import lower_type
from trainer.export_folder import is_hub_id
from trainer.hash import tensors_sha256
from trainer.manifest import Checkpoint, newest_checkpoint
from trainer.models.ddpm import build_unet, find_base, load_base
from trainer.models.network import network
from trainer.models.tiny_unet import Denoiser, build_tiny_unet
from trainer.pixel_base import PixelBase
from trainer.stock import is_stock, stock_recipe

WEIGHTS_FILE = "unet/diffusion_pytorch_model.safetensors"
TIME_TABLE = "time_proj.weight"
_PIXEL_PIPELINES = ("DDIMPipeline", "DDPMPipeline")
_OURS = ("descriptor.json", "manifest.json")


@final
@dataclass(frozen=True, eq=False)
class Source:
    """A model ready to sample: EMA weights in fp32 on the CPU, conditioned on original times, and what is known of it.

    alpha_bar: the full table of T levels that the descriptor's timesteps index. weights_sha256: of the EMA weights.
    trained_steps, checkpoint_sha256: of the checkpoint; None where only the weights are known. stock: as others have trained it, for
    which `recipe` says no more than the model."""

    model: UNet2DModel
    descriptor: Descriptor
    alpha_bar: Float64[Tensor, " T"]
    recipe: RunConfig
    weights_sha256: str
    path: Path
    trained_steps: int | None = None
    checkpoint_sha256: str | None = None
    stock: bool = False


def load_source(path: Path, steps: int | None = None, *, ema: float | None = None) -> Source:
    """Load the EMA weights of a RUN_DIR's newest checkpoint, of a chain's stage, or of an export folder, or a stock pipeline's weights.

    path: may be a Hub id, OWNER/NAME or OWNER/NAME@REVISION, where there is no such folder.
    steps: picks the chain's stage whose student samples in so many steps; where none does, its teacher. ema: picks a run's average
    by its decay; None for the first. Nothing is unpickled.
    Raises: ValueError if there is no such source, or its descriptor, hashes, recipe and weights contradict each other."""
    if not path.exists():
        if is_hub_id(str(path)):
            return _load_stock(path)
        raise ValueError(f"{path}: not there; wanted a RUN_DIR, a chain's directory, an export or a pipeline's folder")
    if is_stock(path):
        return _load_stock(path)
    if (path / "model_index.json").exists():
        return _load_export(path)
    if (path / "chain.json").exists():
        stages, ready = read_chain(path), trained_stages(path)
        stage = next((stage for stage in stages if stage.steps == steps), stages[0])
        if stage not in ready:
            there = ", ".join(str(stage.steps) for stage in ready)
            raise ValueError(
                f"{path}: its model of {stage.steps} steps is not trained yet ({f'those of {there} are' if there else 'none is'}); "
                "give the command that began the chain again, and it goes on"
            )
        return load_source(stage.run_dir, ema=ema)
    if (path / "recipe.yaml").exists():
        return _load_run(path, ema=ema)
    raise ValueError(
        f"{path}: neither a RUN_DIR (recipe.yaml), a chain (chain.json), an export nor a pipeline (model_index.json); give one of these"
    )


def trained_stages(chain: Path) -> tuple[ChainStage, ...]:
    """The stages of a chain that have a checkpoint, teacher first, none of what is no chain; a teacher from elsewhere counts."""
    if not (chain / "chain.json").exists():
        return ()
    return tuple(stage for stage in read_chain(chain) if not stage.trained_here or newest_checkpoint(stage.run_dir) is not None)


def source_place(run_dir: Path, text: str) -> Path:
    """What a run's recipe names as a teacher: a folder as seen from RUN_DIR, or a Hub id where there is none."""
    place = run_dir / text
    return Path(text) if not place.exists() and is_hub_id(text) else place


def is_latent(path: Path) -> bool:
    """Whether a folder is of latents: a run's, its export, or any stock pipeline but those of pixel models' exports."""
    if (path / "model_index.json").is_file():
        return read_json_object(path / "model_index.json").get("_class_name") not in _PIXEL_PIPELINES
    if (path / "chain.json").exists() or not (path / "recipe.yaml").is_file():
        return False
    return not isinstance(load_recipe(path / "recipe.yaml", ()).model, PixelModelConfig)


def denoiser_on(model: nn.Module, device: torch.device, *, precision: str = "fp32") -> Denoiser:
    """A network as a plain function on `device`, to which it is moved; precision: of its activations, the output is fp32.

    Below fp32 the network keeps its weights in that precision, and can be trained or exported no more."""
    predict = network(model.to(device))
    lower = lower_type(precision)
    if lower is None:
        return predict
    hold_weights_in(lower, model)

    def predict_in_lower_type(x_t: Float[Tensor, "b c h w"], timestep: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        with torch.autocast(device.type, lower):
            return predict(x_t, timestep).float()

    return predict_in_lower_type


def time_table(model: UNet2DModel, timesteps: Sequence[int]) -> Float[Tensor, "n c"]:
    """Row k is the sinusoid that the U-Net's positional embedding makes of original time timesteps[k]."""
    return model.time_proj(torch.tensor(timesteps, dtype=torch.float32, device="cpu"))


def _load_run(run_dir: Path, *, ema: float | None) -> Source:
    recipe_path = run_dir / "recipe.yaml"
    if is_latent(run_dir):
        raise ValueError(f"{run_dir}: is of a latent model, and this wants one of pixels; `halfstep sample` and `export` take either")
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(
            f"{run_dir}: no valid checkpoint under checkpoints/; train it first: halfstep train {recipe_path} --run-dir {run_dir}"
        )
    manifest = checkpoint.path / "manifest.json"
    descriptor = Descriptor.from_json(checkpoint.manifest.get("descriptor"), where=str(manifest))
    recipe = load_recipe(recipe_path, ())
    _check_head(checkpoint, recipe)
    tensors = read_tensors(checkpoint, average_part(checkpoint, ema))
    return _assemble(run_dir, descriptor, recipe=recipe, tensors=tensors, checkpoint=checkpoint)


def _check_head(checkpoint: Checkpoint, recipe: RunConfig) -> None:
    """Raise ValueError for a checkpoint whose head is still turning: its output is of neither prediction."""
    turn_steps = getattr(recipe.objective, "turn_steps", None)
    if turn_steps is not None and checkpoint.step < turn_steps:
        raise ValueError(
            f"{checkpoint.path}: its head is still turning, until step {turn_steps} (objective.turn_steps), and is neither its teacher's "
            "nor its own; let the run go on"
        )


def average_part(checkpoint: Checkpoint, decay: float | None) -> str:
    """The part of a checkpoint that holds the average of this decay; None: the first one.

    Raises: ValueError naming the decays that there are."""
    decays = checkpoint.manifest.get("ema_decays")
    kept = decays if isinstance(decays, list) else []
    if decay is None or decay == kept[0]:
        return "ema"
    if decay not in kept:
        raise ValueError(f"{checkpoint.path}: has no average of decay {decay}; give one of {', '.join(map(str, kept))}")
    return f"ema_{kept.index(decay)}"


def _load_stock(path: Path) -> Source:
    """A pipeline that halfstep has not made: a folder, or a Hub id where there is none."""
    base, files = find_base(str(path))
    model = load_base(base, files, base.image_size)
    name, _, revision = str(path).partition("@") if not path.exists() else (str(path), "", "")
    return Source(
        model=model.requires_grad_(False).eval(),
        descriptor=base_descriptor(base, image_size=base.image_size),
        alpha_bar=base.levels.alpha_bar,
        recipe=stock_recipe(name, revision=files.commit or revision or None),
        weights_sha256=tensors_sha256(model.state_dict()),
        path=path,
        stock=True,
    )


def base_descriptor(base: PixelBase, *, image_size: int) -> Descriptor:
    """What weights mean that are a base's, or learn on its levels. image_size: pixels a side that they work on."""
    alpha_bar = base.levels.alpha_bar
    return Descriptor(
        prediction_type=base.levels.prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=tuple(range(len(alpha_bar))),
        clip=base.clip,
        sampler=base.sampler,
        variance=base.variance,
        step_count=len(alpha_bar),
        teacher_sha256=None,
        image_size=image_size,
        channels=base.channels,
        base=base,
    )


def _load_export(folder: Path) -> Source:
    if missing := [name for name in _OURS if not (folder / name).exists()]:
        raise ValueError(f"{folder}: an export without {missing[0]}; export the run again")
    manifest = read_json_object(folder / "manifest.json")
    contents = verified_contents(folder, manifest)
    descriptor = Descriptor.from_json(read_json_object(folder / "descriptor.json"), where=str(folder / "descriptor.json"))
    try:
        tensors = tensors_from_bytes(contents[WEIGHTS_FILE])
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: not a safetensors file: {error}; export the run again") from error
    table = tensors.pop(TIME_TABLE, None)
    source = _assemble(folder, descriptor, recipe=load_recipe(folder / "recipe.yaml", ()), tensors=tensors, checkpoint=None)
    _check_weights(source, manifest.get("weights_sha256"), where=folder / "manifest.json")
    if table is not None:
        wanted = time_table(source.model, descriptor.timesteps)
        # exp and sin differ by a few ulp between machines; times up to 1000 make 1e-4 of it, neighbouring times differ by far more.
        if table.shape != wanted.shape or not torch.allclose(table, wanted, rtol=0.0, atol=1e-3):
            raise ValueError(f"{folder}: {TIME_TABLE} is not the table of descriptor.json's timesteps; export the run again")
    return source


def verified_contents(folder: Path, manifest: Mapping[str, object]) -> dict[str, bytes]:
    """The files of an export that decide what a model is, read once and compared with the manifest's sizes and hashes.

    Raises: ValueError naming the file that is missing or changed."""
    records = manifest.get("files")
    if not isinstance(records, dict):
        raise ValueError(f"{folder / 'manifest.json'}: 'files' is not an object; export the run again")
    contents = {}
    for name in ("descriptor.json", "recipe.yaml", WEIGHTS_FILE):
        file = folder / name
        contents[name] = file.read_bytes() if file.is_file() else b""
        record = content_record(contents[name])
        if record != records.get(name):
            raise ValueError(
                f"{file}: is {record}, manifest.json says {records.get(name)}; it is damaged or was edited: export the run again"
            )
    return contents


def _assemble(
    path: Path, descriptor: Descriptor, *, recipe: RunConfig, tensors: dict[str, Tensor], checkpoint: Checkpoint | None
) -> Source:
    alpha_bar = _alpha_bar(path, descriptor, recipe)
    _check_descriptor(path, descriptor, recipe, alpha_bar=alpha_bar)
    # On the meta device no random number is drawn and no memory taken before the weights are there.
    with torch.device("meta"):
        model = _network(descriptor, recipe)
    check_tensors(path, tensors, model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return Source(
        model=model.requires_grad_(False).eval(),
        descriptor=descriptor,
        alpha_bar=alpha_bar,
        recipe=recipe,
        weights_sha256=tensors_sha256(tensors),
        path=path,
        trained_steps=checkpoint and checkpoint.step,
        checkpoint_sha256=checkpoint and checkpoint.sha256,
    )


def _alpha_bar(path: Path, descriptor: Descriptor, recipe: RunConfig) -> Float64[Tensor, " T"]:
    """The full table of noise levels: the recipe's, or the base's in the descriptor."""
    match recipe.model:
        case TinyUNetConfig() if descriptor.base is None:
            return build_alpha_bar(recipe.noise_schedule)
        case DdpmConfig() if descriptor.base is not None:
            return descriptor.base.alpha_bar(recipe.noise_schedule)
        case other:
            raise ValueError(f"{path}: the descriptor is not of model.kind={other.kind}; put the original recipe.yaml back")


def _network(descriptor: Descriptor, recipe: RunConfig) -> UNet2DModel:
    """The network without its weights, on torch's default device."""
    match recipe.model:
        case TinyUNetConfig() as tiny:
            return build_tiny_unet(tiny, descriptor.image_size, image_channels=descriptor.channels)
        case DdpmConfig() as stock if descriptor.base is not None:
            return build_unet(descriptor.base.unet, descriptor.image_size, dropout=stock.dropout)
        case other:
            raise ValueError(f"model.kind={other.kind} is no pixel model")


def _check_weights(source: Source, wanted: object, *, where: Path) -> None:
    if source.weights_sha256 != wanted:
        raise ValueError(
            f"{source.path}: the EMA weights have sha256 {source.weights_sha256}, {where} says {wanted}; train or export again"
        )


def _check_descriptor(path: Path, descriptor: Descriptor, recipe: RunConfig, *, alpha_bar: Float64[Tensor, " T"]) -> None:
    """Raise ValueError if the descriptor does not say what the recipe beside it says."""
    objective = pixel_objective(recipe)
    own_steps = objective.student_steps if objective.kind == "progressive_distillation" else len(alpha_bar)
    prediction = objective.prediction
    if descriptor.base is not None and (prediction == "base" or isinstance(objective, DenoisingConfig)):
        prediction = descriptor.base.prediction(prediction)
    wanted = {
        "prediction_type": (descriptor.prediction_type, prediction),
        "alpha_bar_sha256": (descriptor.alpha_bar_sha256, alpha_bar_sha256(alpha_bar)),
        "step_count": (descriptor.step_count, own_steps),
    }
    for field, (got, expected) in wanted.items():
        if got != expected:
            raise ValueError(
                f"{path}: the descriptor's {field} is {got}, recipe.yaml makes {expected}; "
                "one of the two was changed after training: put the original recipe.yaml back"
            )
    if descriptor.timesteps[-1] != len(alpha_bar) - 1:
        raise ValueError(
            f"{path}: the descriptor's noisiest time is {descriptor.timesteps[-1]}, the noise schedule's is {len(alpha_bar) - 1}; "
            "put the original recipe.yaml back"
        )


def check_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError if names or shapes are not those of the recipe's model."""
    for name in sorted(tensors.keys() | wanted.keys()):
        got = tuple(tensors[name].shape) if name in tensors else "missing"
        expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        if got != expected:
            raise ValueError(
                f"{path}: weight {name} is {got}, recipe.yaml's model section makes {expected}; put the original recipe.yaml back"
            )
