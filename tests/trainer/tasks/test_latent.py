"""Latent tasks: what a micro-batch is depends on its place alone, what is stored counts as what is encoded, and what learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_shards import ranks
from data_shards.derive.request import EncodeRequest
from data_shards.encoders.efficient_net import EfficientNetEncoder
from data_shards.reading.sample import MicroBatch
from tests.derive_runs import derived
from tests.trainer.latents.finished_runs import Bases
from tests.trainer.tasks.latent_steps import SIDE, Steps, recipe, start
from trainer.config import RunConfig
from trainer.descriptor import difference
from trainer.draws import draw, draw_latent
from trainer.latents.base import find_part
from trainer.latents.inputs import build_inputs
from trainer.latents.trained import build_trained
from trainer.prompting.folder import load_pipeline
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest
from trainer.prompting.pictures import draw as draw_pictures
from trainer.tasks.build import needed_fields
from trainer.tasks.latent import _prepared, check_stored
from trainer.tasks.task import Work
from trainer.training_data import TrainingData

CPU = torch.device("cpu")


@dataclass
class Seen:
    """What a network is asked, and the losses where it answers with zeros."""

    x_t: Tensor
    timestep: Tensor
    cond: Mapping[str, Tensor]
    losses: Tensor

    def equals(self, other: "Seen") -> bool:
        """Bit for bit."""
        mine, others = (x.cond | {"x_t": x.x_t, "t": x.timestep, "losses": x.losses} for x in (self, other))  # type: ignore[operator]
        return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def _seen(work: Work) -> Seen:
    asked: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []

    def network(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        asked.append((x_t, timestep, cond))
        return torch.zeros_like(x_t)

    losses = work.loss(network)  # type: ignore[arg-type]
    [(x_t, timestep, cond)] = asked
    return Seen(x_t, timestep, cond, losses)


@pytest.fixture(scope="module")
def base(bases: Bases) -> Path:
    """Stable Diffusion."""
    return bases("stable_diffusion")


@pytest.fixture(scope="module")
def lora(base: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """A LoRA run of everything that draws random numbers, after no step."""
    objective = {"caption_dropout": 0.4, "offset_noise": 0.1, "input_perturbation": 0.1}
    config = recipe(
        faces,
        {"kind": "stable_diffusion", "base": str(base)},
        adaptation={"kind": "lora"},
        objective=objective,
        data={"horizontal_flip": True},
        validation={"prompts": ["a couple"]},
    )
    return start(config, tmp_path_factory.mktemp("lora"))


def test_a_micro_batch_depends_on_its_place_alone(lora: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = lora.batches(3)
    wanted = _seen(lora.task.micro_batch(batches[2, 1], 2, 1))
    torch.rand(5)
    for place in ((0, 0), (2, 0), (1, 1)):
        assert not _seen(lora.task.micro_batch(batches[place], *place)).equals(wanted)
    assert _seen(lora.task.micro_batch(batches[2, 1], 2, 1)).equals(wanted)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert _seen(lora.task.micro_batch(batches[2, 1], 2, 1)).equals(wanted)


def test_a_late_start_reads_what_an_early_one_does(lora: Steps) -> None:
    early = lora.batches(3)[2, 1][0]
    [late] = lora.data[0].batches(2, 3, range(1, 2), pin=False)
    assert early.keys == late.keys and early.captions == late.captions and torch.equal(early.images, late.images)


def test_examples_are_the_first_samples_with_captions(lora: Steps) -> None:
    [data], first = lora.data, [lora.batches(1)[0, index][0] for index in range(2)]
    found = data.examples(3)
    assert found.keys == (first[0].keys + first[1].keys)[:3] and all(found.captions)
    assert torch.equal(found.images, torch.cat([batch.images for batch in first])[:3])
    assert len(data.examples(100).keys) == 4, "no more than a step has"


def test_a_step_moves_the_adapter_alone_and_the_first_pictures_are_the_bases(lora: Steps, base: Path) -> None:
    assert lora.task.draw is not None
    first = lora.task.draw(lora.engine.raw(), 0)
    kept = np.array(Image.open(lora.run_dir / "samples" / "base.png"))
    request = PictureRequest("a couple", 0, guidance_scale=7.5, steps=2, size=(SIDE, SIDE))
    stock = draw_pictures(painter(load_pipeline(base, device=CPU)), [request], batch_size=1)[0].numpy()
    assert np.abs(kept.astype(int) - stock.astype(int)).max() <= 1
    module = lora.task.module
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for step in range(2):
        assert lora.take(step, lora.batches(2)).outcome == "applied"
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert moved == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert moved == set(lora.engine.state()["model"])
    later = lora.task.draw(lora.engine.raw(), 2)
    assert later.picture.size == first.picture.size and later.picture.tobytes() != first.picture.tobytes()
    assert np.array_equal(np.array(Image.open(lora.run_dir / "samples" / "base.png")), kept), "only step 0 draws the base"


def test_a_new_token_trains_its_row_and_nothing_else_of_the_text_encoder(base: Path) -> None:
    dreambooth = {"instance_prompt": "a <cmg>cartoon", "new_token": "<cmg>"}
    config = recipe(Path("none"), {"kind": "stable_diffusion", "base": str(base)}, adaptation={"kind": "lora"}, dreambooth=dreambooth)
    trained = build_trained(config)
    learns = {name for name, parameter in trained.module.named_parameters() if parameter.requires_grad}
    [row] = {name for name in learns if name.startswith("text_encoder.")}
    assert row.endswith("new_rows") and all("lora_" in name for name in learns - {row})
    assert trained.module.get_parameter(row).shape[0] == 1
    assert trained.tokenizer is not None and "<cmg>" in trained.tokenizer.get_vocab()


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_what_learns_is_fp32_in_a_bf16_run_and_frozen_layers_are_bf16(adaptation: str, base: Path) -> None:
    config = recipe(
        Path("none"),
        {"kind": "stable_diffusion", "base": str(base), "train_text_encoder": True},
        adaptation={"kind": adaptation},
        engine={"precision": "bf16"},
    )
    module = build_trained(config).module
    assert {parameter.dtype for parameter in module.parameters() if parameter.requires_grad} == {torch.float32}
    frozen = [
        parameter
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for parameter in layer.parameters(recurse=False)
        if not parameter.requires_grad
    ]
    assert {parameter.dtype for parameter in frozen} == ({torch.bfloat16} if adaptation == "lora" else set())


def test_weights_of_a_run_start_the_same_whatever_was_drawn_before(base: Path) -> None:
    config = recipe(Path("none"), {"kind": "stable_diffusion", "base": str(base)}, adaptation={"kind": "lora"})
    first = build_trained(config).module.state_dict()
    torch.rand(3)
    second = build_trained(config).module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_xl_remembers_both_text_encoders(lora: Steps, faces: Path, bases: Bases, tmp_path: Path) -> None:
    base = str(bases("stable_diffusion_xl"))
    meaning = start(
        recipe(faces, {"kind": "stable_diffusion", "base": base}, adaptation={"kind": "lora"}), tmp_path
    ).task.descriptor.to_json()
    for number, part in (("text_sha256", "text_encoder"), ("text_2_sha256", "text_encoder_2")):
        assert meaning[number] == find_part(base, part, revision=None).sha256
    assert lora.task.descriptor.to_json()["text_2_sha256"] is None
    assert difference({**meaning, "text_2_sha256": "0" * 64}, meaning).startswith("text_2_sha256: ")
    without = {name: value for name, value in meaning.items() if name != "text_2_sha256"}
    assert difference(without, meaning) == "", "a checkpoint that does not say so goes on"
    assert difference({}, meaning) != ""


# Inpainting.


def test_a_flip_mirrors_image_and_stored_mask_together(base: Path) -> None:
    stored = {"kind": "latent_denoising", "inpainting": {"source": "stored"}}
    model = {"kind": "stable_diffusion", "base": str(base)}
    flipping = recipe(Path("none"), model, objective=stored, data={"horizontal_flip": True}, dreambooth={"instance_prompt": "a face"})
    assert needed_fields(flipping) == ("image", "mask.png")
    still = flipping.model_copy(update={"data": flipping.data.model_copy(update={"horizontal_flip": False})})
    inputs = build_inputs(flipping, build_trained(flipping), device=CPU)
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, SIDE, SIDE), generator=stream, dtype=torch.uint8)
    masks = (torch.rand(8, 1, SIDE // 8, SIDE // 8, generator=stream) < 0.5).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    batch = MicroBatch(images, tuple("abcdefgh"), (None,) * 8, tensors={"mask.png": masks})
    flips = draw(flipping.seed, 0, 0, shape=(8, 4, 8, 8), micro_batches=2, stratified=True).flips
    assert 0 < int(flips.sum()) < 8
    mirrored = replace(
        batch,
        images=torch.stack([image.flip(2) if flip else image for image, flip in zip(images, flips, strict=True)]),
        tensors={"mask.png": torch.stack([mask.flip(2) if flip else mask for mask, flip in zip(masks, flips, strict=True)])},
    )
    found, wanted = _prepared(flipping, inputs, batch, 0, 0, number=0), _prepared(still, inputs, mirrored, 0, 0, number=0)
    assert torch.equal(found.x_0, wanted.x_0) and found.mask is not None and wanted.mask is not None
    assert torch.equal(found.mask, wanted.mask)
    assert all(torch.equal(found.cond[name], wanted.cond[name]) for name in ("mask", "masked_latents", "text"))
    assert torch.equal(found.mask, mirrored.tensors["mask.png"][:, :, ::8, ::8].float())


# Stored latents and text.


@pytest.fixture(scope="module")
def encoded(base: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces' latents and captions' states in fp16."""
    out = tmp_path_factory.mktemp("encoded") / "shards"
    assert derived(faces, out, EncodeRequest(vae=str(base), text_encoder=str(base), size=SIDE, batch_size=4, precision="fp32")) == 0
    return out


def _first_seen(config: RunConfig) -> tuple[Tensor, dict[str, Tensor], Sequence[str]]:
    data = TrainingData.open(config, Path(), fields=needed_fields(config))
    inputs = build_inputs(config, build_trained(config), device=CPU)
    check_stored(config, data)
    [batch] = data.batches(0, 1, range(1), pin=False)
    part = _prepared(config, inputs, batch, 0, 0, number=0)
    return part.x_0, part.cond, batch.keys


def test_stored_latents_and_text_count_as_encoded_ones_with_captions_dropped_alike(base: Path, faces: Path, encoded: Path) -> None:
    sections = {"objective": {"kind": "latent_denoising", "caption_dropout": 0.5}, "data": {"global_batch_size": 8, "micro_batch_size": 8}}
    model = {"kind": "stable_diffusion", "base": str(base)}
    live = _first_seen(recipe(faces, model, **sections))
    stored = _first_seen(recipe(encoded, {**model, "latents": "stored", "text": "stored"}, **sections))
    assert live[2] == stored[2]
    torch.testing.assert_close(stored[0], live[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored[1]["text"], live[1]["text"], rtol=2e-3, atol=2e-3)
    dropped = draw_latent(0, 0, 0, shape=(8, 4, 8, 8), posterior=False, perturbed=False, caption_dropout=0.5).caption_dropped
    assert 0 < int(dropped.sum()) < 8
    empty = live[1]["text"][dropped]
    assert torch.equal(stored[1]["text"][dropped], empty) and torch.equal(empty, empty[:1].expand_as(empty))
    assert not torch.allclose(live[1]["text"][~dropped], empty[:1].expand(int((~dropped).sum()), -1, -1), atol=1e-3)


def test_shards_of_another_models_encoder_are_refused(encoded: Path, bases: Bases) -> None:
    other = bases("stable_diffusion_v")
    config = recipe(encoded, {"kind": "stable_diffusion", "base": str(other), "latents": "stored", "text": "stored"})
    data = TrainingData.open(config, Path(), fields=needed_fields(config))
    with pytest.raises(ValueError, match=r"its text.npy was made by .*stable_diffusion.* wanted .*halfstep shards encode"):
        check_stored(config, data)


def _with_the_compressor(faces: Path, compressor: Path, out: Path) -> Path:
    """The faces as a Wuerstchen prior learns them, made by an image encoder that is one file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({"effnet_state_dict": EfficientNetEncoder().state_dict()}, compressor)
    assert derived(faces, out, EncodeRequest(image_encoder=str(compressor), size=32, batch_size=16, precision="fp32")) == 0
    return out


def test_stored_latents_of_wuerstchen_are_compared_with_the_file_or_folder_that_holds_its_compressor(
    faces: Path, bases: Bases, tmp_path: Path
) -> None:
    """configs/recipes/wuerstchen_prior_cartoon.yaml names a file, and the prior's own folder on the Hub has no image encoder."""
    compressor = tmp_path / "model_v2_stage_b.pt"
    shards, whole, bare = _with_the_compressor(faces, compressor, tmp_path / "out"), bases("wuerstchen_prior"), tmp_path / "bare"
    bare.mkdir()
    for entry in whole.iterdir():
        if entry.name != "image_encoder":
            (bare / entry.name).symlink_to(entry)

    def check(base: Path, image_encoder: Path | None) -> None:
        model = {"kind": "wuerstchen_prior", "base": str(base), "latents": "stored", "image_encoder": image_encoder and str(image_encoder)}
        config = recipe(shards, model)
        check_stored(config, TrainingData.open(config, Path(), fields=("image.npy",)))

    assert (whole / "image_encoder").is_dir()
    check(bare, compressor)
    check(whole, compressor)
    check(bare, None)
    for base, other in ((whole, None), (bare, whole)):
        with pytest.raises(ValueError, match=r"its image.npy was made by model_v2_stage_b.pt .* wanted .*; encode them with that model"):
            check(base, other)
    compressor.write_bytes(compressor.read_bytes() + b"another")
    with pytest.raises(ValueError, match=r"its image.npy was made by model_v2_stage_b.pt .* wanted"):
        check(bare, compressor)


def test_wuerstchens_prior_sees_more_noise_where_the_recipe_perturbs_its_input(faces: Path, bases: Bases, tmp_path: Path) -> None:
    model, seen = {"kind": "wuerstchen_prior", "base": str(bases("wuerstchen_prior"))}, list[Seen]()
    for strength in (0.0, 0.5):
        steps = start(recipe(faces, model, objective={"input_perturbation": strength}), tmp_path / str(strength))
        seen.append(_seen(steps.task.micro_batch(steps.batches(1)[0, 0], 0, 0)))
    plain, perturbed = seen
    added = perturbed.x_t - plain.x_t
    assert torch.equal(plain.timestep, perturbed.timestep) and 0 < float(added.std()) < 0.6
    assert torch.equal(plain.losses, perturbed.losses), "the target is the noise that was drawn"


def test_shards_without_what_the_model_learns_from_are_refused(base: Path, encoded: Path, faces: Path, tmp_path: Path) -> None:
    config = recipe(encoded, {"kind": "stable_diffusion", "base": str(base)})
    with pytest.raises(ValueError, match=r"holds .*latents.npy.* and no images, which this model learns from; give the shards"):
        TrainingData.open(config, tmp_path, fields=("image",))
    without_masks = TrainingData.open(recipe(faces, {"kind": "stable_diffusion"}), tmp_path, fields=("image", "mask.png"))
    with pytest.raises(ValueError, match=r"holds no mask.png; pack images that have a NAME.mask.png beside them"):
        without_masks.batches(0, 1, range(1), pin=False)
