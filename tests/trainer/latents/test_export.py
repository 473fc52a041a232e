"""Exports of latent runs: stock diffusers loads them and draws what `halfstep sample` draws; whole or absent."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from PIL import Image

from tests.trainer.latents.finished_runs import (
    PROMPTS,
    SIDE,
    STEPS,
    Bases,
    as_array,
    drawn,
    generators,
    largest_difference,
    recipe,
    run_card,
    write_inpainting_files,
    write_run,
)
from trainer.export import export_job, export_run
from trainer.export_folder import exported_checkpoint, exported_sha256
from trainer.latents.drawing import Given
from trainer.latents.export import export_latent_run
from trainer.latents.finished import load_finished
from trainer.manifest import newest_checkpoint

ASKED = {"prompts": list(PROMPTS), "images": 1, "steps": STEPS, "guidance": 3.0}
ONE = {**ASKED, "prompts": [PROMPTS[0]]}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
TOKEN = "<cmg>"


def stock(pipeline: StableDiffusionPipeline, **named: object) -> np.ndarray:
    """What a user's lines draw of both prompts."""
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, object] = {"generator": [generators(1)[0] for _ in PROMPTS], "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return as_array(pipeline(list(PROMPTS), **{**call, **named}).images)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def test_a_fully_trained_stable_diffusion_is_a_stock_pipeline_that_draws_as_its_run_does(bases: Bases, tmp_path: Path) -> None:
    base = bases("stable_diffusion_v")
    run_dir = write_run(tmp_path / "run", recipe({"kind": "stable_diffusion", "base": str(base)}))
    ours = drawn(run_dir, ASKED)
    assert ours.std() > 10
    folder = export_run(run_dir)
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert largest_difference(stock(loaded), ours) <= 2
    assert largest_difference(drawn(folder, ASKED), ours) <= 2
    assert largest_difference(stock(StableDiffusionPipeline.from_pretrained(base)), ours) > 20
    vae, theirs = loaded.vae.state_dict(), StableDiffusionPipeline.from_pretrained(base).vae.state_dict()
    assert all(vae[name].dtype == torch.float32 and torch.equal(vae[name], theirs[name]) for name in theirs)
    assert largest_difference(run_card(folder, tmp_path / "work", {}), ours[0]) <= 2


def test_a_lora_with_text_encoder_and_new_token_draws_the_same_by_every_form_of_it(bases: Bases, tmp_path: Path) -> None:
    base = bases("stable_diffusion_v")
    prompts = [f"a {TOKEN}couple", "a couple"]
    config = recipe(
        {"kind": "stable_diffusion", "base": str(base), "train_text_encoder": True},
        adaptation=LORA,
        dreambooth={"instance_prompt": prompts[0], "new_token": TOKEN, "token_from": "couple"},
        validation={"prompts": prompts, "guidance_scale": 3.0},
    )
    run_dir = write_run(tmp_path / "run", config)
    asked = {**ASKED, "prompts": prompts}
    ours = drawn(run_dir, asked)
    folder = export_run(run_dir)
    assert largest_difference(drawn(folder, asked), ours) <= 2
    assert (folder / "learned_embeds.safetensors").is_file() and not (folder / "scheduler").exists()
    assert largest_difference(run_card(folder, tmp_path / "work", {base.name: base}), ours[0]) <= 2

    kohya = StableDiffusionPipeline.from_pretrained(base)
    kohya.set_progress_bar_config(disable=True)
    kohya.load_textual_inversion(str(folder), weight_name="learned_embeds.safetensors")
    kohya.load_lora_weights(str(folder), weight_name="run_kohya.safetensors")
    images = kohya(prompts, generator=[generators(1)[0] for _ in prompts], num_inference_steps=STEPS, guidance_scale=3.0).images  # pyright: ignore
    assert largest_difference(as_array(images), ours) <= 2  # pyright: ignore[reportArgumentType]

    assert export_job(run_dir, {"merged": True, "out": str(tmp_path / "merged")}) == 0
    assert largest_difference(drawn(tmp_path / "merged", asked), ours) <= 2
    assert largest_difference(run_card(tmp_path / "merged", tmp_path / "work2", {}), ours[0]) <= 2
    with pytest.raises(ValueError, match="--merged: give the new folder"):
        export_job(run_dir, {"merged": True})


@pytest.mark.parametrize("zero_terminal", [True, False])
def test_a_lora_of_another_prediction_brings_its_scheduler(bases: Bases, tmp_path: Path, *, zero_terminal: bool) -> None:
    base = bases("stable_diffusion")
    objective = {"kind": "latent_denoising", "zero_terminal_snr": zero_terminal, "prediction": "v"}
    config = recipe({"kind": "stable_diffusion", "base": str(base)}, adaptation=LORA, objective=objective)
    run_dir = write_run(tmp_path / "run", config)
    ours, folder = drawn(run_dir, ASKED), export_run(run_dir)
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert written["prediction_type"] == "v_prediction" and bool(written.get("rescale_betas_zero_snr")) is zero_terminal
    assert largest_difference(drawn(folder, ASKED), ours) <= 2
    assert largest_difference(run_card(folder, tmp_path / "work", {base.name: base}), ours[0]) <= 2


@pytest.mark.parametrize(
    ("kind", "adaptation"),
    [("stable_diffusion", {"kind": "full"}), ("stable_diffusion_inpainting", LORA)],
)
def test_an_inpainting_run_is_a_stock_inpainting_pipeline(bases: Bases, tmp_path: Path, kind: str, adaptation: dict[str, object]) -> None:
    base = bases(kind)
    objective = {"kind": "latent_denoising", "inpainting": {}}
    run_dir = write_run(
        tmp_path / "run", recipe({"kind": "stable_diffusion", "base": str(base)}, objective=objective, adaptation=adaptation)
    )
    image, mask = write_inpainting_files(tmp_path)
    asked = {**ONE, "image": str(image), "mask": str(mask)}
    ours, folder = drawn(run_dir, asked), export_run(run_dir)
    assert largest_difference(drawn(folder, asked), ours) <= 2
    assert largest_difference(run_card(folder, tmp_path / "work", {base.name: base}), ours[0]) <= 2
    if adaptation["kind"] == "full":
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionInpaintPipeline"
        loaded = StableDiffusionInpaintPipeline.from_pretrained(folder)
        assert loaded.unet.config["in_channels"] == 9
        loaded.set_progress_bar_config(disable=True)
        for side in (128, 512):
            given = {"image": Image.open(image), "mask_image": Image.open(mask), "height": side, "width": side}
            [picture] = loaded("a couple", num_inference_steps=1, **given).images  # pyright: ignore
            assert picture.size == (side, side)


@pytest.mark.parametrize("adaptation", [{"kind": "full"}, LORA])
def test_stable_diffusion_xl_is_loaded_by_stock_diffusers(bases: Bases, tmp_path: Path, adaptation: dict[str, object]) -> None:
    base = bases("stable_diffusion_xl")
    run_dir = write_run(tmp_path / "run", recipe({"kind": "stable_diffusion", "base": str(base)}, adaptation=adaptation), moved=0.02)
    ours, folder = drawn(run_dir, ONE), export_run(run_dir)
    assert largest_difference(drawn(folder, ONE), ours) <= 2
    assert largest_difference(run_card(folder, tmp_path / "work", {base.name: base}), ours[0]) <= 2
    if adaptation is LORA:
        on_base = {**ONE, "size": str(SIDE)}
        assert largest_difference(drawn(base, on_base, Given(lora=folder / "run_kohya.safetensors")), ours) <= 2
        assert largest_difference(drawn(base, on_base), ours) > 2


def test_a_model_from_scratch_is_a_whole_pipeline_that_can_be_a_base(bases: Bases, tmp_path: Path) -> None:
    autoencoder = bases("autoencoder")
    model = {
        "kind": "latent_base",
        "autoencoder": str(autoencoder),
        "channels": [32, 32],
        "attention": [False, True],
        "text_width": 32,
        "text_layers": 1,
    }
    config = recipe(model, noise_schedule={"kind": "scaled_linear"})
    run_dir = write_run(tmp_path / "run", config)
    ours, folder = drawn(run_dir, ASKED), export_run(run_dir)
    assert largest_difference(stock(StableDiffusionPipeline.from_pretrained(folder)), ours) <= 2
    assert largest_difference(drawn(folder, ASKED), ours) <= 2
    lora = write_run(tmp_path / "lora", recipe({"kind": "stable_diffusion", "base": str(folder)}, adaptation=LORA))
    assert largest_difference(drawn(export_run(lora), ASKED), drawn(lora, ASKED)) <= 2


@pytest.mark.parametrize("adaptation", [{"kind": "full"}, LORA])
def test_wuerstchens_prior_is_loaded_by_stock_diffusers(bases: Bases, tmp_path: Path, adaptation: dict[str, object]) -> None:
    base = bases("wuerstchen_prior")
    decoder = base / "decoder"
    run_dir = write_run(
        tmp_path / "run", recipe({"kind": "wuerstchen_prior", "base": str(base), "decoder": str(decoder)}, adaptation=adaptation)
    )
    ours, folder = drawn(run_dir, ONE), export_run(run_dir)
    assert largest_difference(drawn(folder, ONE), ours) <= 2
    assert largest_difference(run_card(folder, tmp_path / "work", {base.name: base, "decoder": decoder}), ours[0]) <= 2
    needed = [folder.name, *([base.name] if adaptation == LORA else []), "decoder"]
    assert f"where these folders are ({', '.join(needed)})" in (folder / "README.md").read_text()


@pytest.mark.parametrize("adaptation", [{"kind": "full"}, LORA])
@pytest.mark.parametrize("half", ["prior", "decoder"])
def test_either_half_of_kandinsky_is_loaded_by_stock_diffusers(
    bases: Bases, tmp_path: Path, half: str, adaptation: dict[str, object]
) -> None:
    prior, decoder = bases("kandinsky22_prior"), bases("kandinsky22_decoder")
    if half == "prior":
        model = {"kind": "kandinsky22_prior", "base": str(prior), "decoder": str(decoder)}
    else:
        model = {"kind": "kandinsky22_decoder", "base": str(decoder), "prior": str(prior)}
    run_dir = write_run(tmp_path / "run", recipe(model, adaptation=adaptation))
    # A prior's card says its own steps, a decoder's leaves the prior at its default.
    asked = {**ONE, "decoder_steps": STEPS} if half == "prior" else {**ONE, "steps": None, "guidance": None, "decoder_steps": STEPS}
    ours, folder = drawn(run_dir, asked), export_run(run_dir)
    assert largest_difference(drawn(folder, asked), ours) <= 2
    models = {prior.name: prior, decoder.name: decoder}
    assert largest_difference(run_card(folder, tmp_path / "work", models, decoder_steps=STEPS), ours[0]) <= 2
    if half == "prior" and adaptation is LORA:
        run_card(folder, tmp_path / "unchanged", models)


@pytest.fixture(scope="session")
def lora_run(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run, not to be changed."""
    config = recipe({"kind": "stable_diffusion", "base": str(bases("stable_diffusion"))}, adaptation=LORA)
    return write_run(tmp_path_factory.mktemp("lora") / "run", config)


def test_an_export_is_whole_or_absent_and_names_its_checkpoint(lora_run: Path, tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(lora_run)
    assert checkpoint is not None
    folder = export_latent_run(lora_run, tmp_path / "export")
    assert exported_checkpoint(folder) == checkpoint.sha256
    assert exported_sha256(folder) == load_finished(lora_run).weights_sha256
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert export_latent_run(lora_run, folder) == folder and (folder / "manifest.json").stat().st_mtime_ns == written
    (folder / "README.md").write_text("My own words.")
    assert exported_checkpoint(folder) == checkpoint.sha256
    (folder / "run_kohya.safetensors").write_bytes(b"")
    assert exported_checkpoint(folder) is None
    export_latent_run(lora_run, folder)
    assert exported_checkpoint(folder) == checkpoint.sha256
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not an export and not empty"):
        export_latent_run(lora_run, tmp_path / "mine")


def test_a_run_without_its_base_or_with_foreign_weights_is_refused(bases: Bases, lora_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(lora_run, run_dir)
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(text.replace("rank: 4", "rank: 2"))
    with pytest.raises(ValueError, match=r"lora_A.default.weight is \(4, .*, recipe.yaml's model section makes \(2, "):
        load_finished(run_dir)
    other = bases("stable_diffusion_v")
    (run_dir / "recipe.yaml").write_text(text.replace(str(bases("stable_diffusion")), str(other)))
    with pytest.raises(ValueError, match="was trained from a base of sha256"):
        load_finished(run_dir)
    full = write_run(tmp_path / "full", recipe({"kind": "stable_diffusion", "base": str(other)}))
    with pytest.raises(ValueError, match="there is no adapter to merge"):
        export_job(full, {"merged": True, "out": str(tmp_path / "merged")})
    with pytest.raises(ValueError, match=r"no average of decay 0\.5; give one of 0\.995"):
        load_finished(full, ema=0.5)


def test_an_export_says_nothing_of_this_machine(lora_run: Path, bases: Bases, tmp_path: Path) -> None:
    folder = export_latent_run(lora_run, tmp_path / "export")
    merged = export_latent_run(lora_run, tmp_path / "merged", merged=True)
    for file in [*folder.rglob("*"), *merged.rglob("*")]:
        if file.is_file():
            assert str(bases.root).encode() not in file.read_bytes(), file
    card = (folder / "README.md").read_text()
    assert "- lora\n" in card and "`stable_diffusion`" in card and "base_model" not in card
    assert json.loads((folder / "descriptor.json").read_text())["schema_version"] == 1


def test_a_sheet_of_the_run_is_the_cards_picture_and_else_one_is_drawn(lora_run: Path, tmp_path: Path) -> None:
    assert export_job(lora_run, {"out": str(tmp_path / "drawn")}) == 0
    assert Image.open(tmp_path / "drawn" / "samples.png").width > 2 * SIDE
    run_dir = tmp_path / "run"
    shutil.copytree(lora_run, run_dir)
    (run_dir / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run_dir / "samples" / "step_000007.png")
    assert Image.open(export_run(run_dir) / "samples.png").size == (8, 8)
