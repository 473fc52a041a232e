"""`halfstep sample` of models that are told what to draw: options, what they are refused with, and the picture that is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_shards import ranks
from tests.trainer.latents.finished_runs import PROMPTS, STEPS, Bases, drawn, drawn_by, largest_difference, recipe, write_run
from trainer.export import export_run
from trainer.export_folder import LORA_FILE
from trainer.latents.drawing import Drawer, Given, open_drawer
from trainer.latents.export import export_latent_run
from trainer.latents.finished import load_finished
from trainer.latents.pipelines import Parts, assemble
from trainer.latents.sizes import picture_side
from trainer.latents.stand_ins import TextStandIn, stand_in
from trainer.models.network import network
from trainer.prompting.folder import load_pipeline
from trainer.prompting.pictures import no_tick
from trainer.sample import sample_job
from trainer.source import load_source

ASKED = {"prompts": [PROMPTS[0]], "images": 1, "steps": STEPS, "guidance": 3.0}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def run_dir(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run with its export."""
    config = recipe({"kind": "stable_diffusion", "base": str(bases("stable_diffusion_v"))}, adaptation=LORA)
    folder = write_run(tmp_path_factory.mktemp("lora") / "run", config)
    export_run(folder)
    return folder


def test_a_lora_on_its_base_is_the_run_and_counts_as_much_as_it_is_told(bases: Bases, run_dir: Path) -> None:
    base, ours = bases("stable_diffusion_v"), drawn(run_dir, ASKED)
    on_base = {**ASKED, "size": "64"}
    assert largest_difference(drawn(base, on_base, Given(lora=run_dir / "export" / LORA_FILE)), ours) <= 2
    half = drawn(run_dir, ASKED, Given(lora_scale=0.5))
    assert largest_difference(half, ours) > 5
    assert largest_difference(half, drawn(run_dir / "export", ASKED, Given(lora_scale=0.5))) <= 2
    nothing = drawn(run_dir, ASKED, Given(lora_scale=0.0))
    assert largest_difference(nothing, drawn(base, on_base)) <= 2


def test_a_handed_on_lora_asks_for_its_base_and_takes_no_other(bases: Bases, run_dir: Path, tmp_path: Path) -> None:
    folder = export_latent_run(run_dir, tmp_path / "handed_on")
    with pytest.raises(ValueError, match="is a LoRA for stable_diffusion_v, which is not here; give its base, --base DIR"):
        drawn(folder, ASKED)
    with pytest.raises(ValueError, match="was trained on a base of sha256"):
        drawn(folder, ASKED, Given(base=str(bases("stable_diffusion"))))
    ours = drawn(folder, ASKED, Given(base=str(bases("stable_diffusion_v"))))
    assert largest_difference(ours, drawn(run_dir, ASKED)) <= 2


def test_options_that_do_not_fit_are_refused(bases: Bases, run_dir: Path) -> None:
    base = bases("stable_diffusion_v")
    for path, given, message in (
        (run_dir, Given(lora=run_dir / "export"), "is a LoRA already"),
        (base, Given(lora_scale=2.0), "has no LoRA"),
        (base, Given(base="x"), "--base x: .* leave --base out"),
        (run_dir, Given(companion=str(base)), "draws on its own"),
        (run_dir, Given(sampler="ancestral"), "--sampler ancestral is not known; give one of ddim"),
        (bases("kandinsky22_prior"), Given(), "is a prior.*--decoder DIR"),
        (bases("kandinsky22_decoder"), Given(), "is a decoder.*--prior DIR"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(path, ASKED, given)
    with pytest.raises(ValueError, match="give --prompt TEXT"):
        drawn(run_dir, {})


def test_another_sampler_and_a_negative_prompt_draw_another_picture(run_dir: Path) -> None:
    ours = drawn(run_dir, ASKED)
    assert largest_difference(drawn(run_dir, ASKED, Given(sampler="euler")), ours) > 2
    assert largest_difference(drawn(run_dir, {**ASKED, "negative_prompt": "a woman"}), ours) > 2


def test_the_job_writes_a_grid_or_a_sheet_of_prompts(run_dir: Path, tmp_path: Path) -> None:
    assert sample_job(run_dir, {**ASKED, "seed": 1, "out": str(tmp_path / "single")}) == 0
    single = np.asarray(Image.open(tmp_path / "single" / "image_00000.png")).astype(int)
    assert largest_difference(single, drawn(run_dir, {**ASKED, "seed": 1})[0]) <= 2
    assert sample_job(run_dir, {**ASKED, "prompts": list(PROMPTS), "out": str(tmp_path / "sheet.png")}) == 0
    assert Image.open(tmp_path / "sheet.png").height > 2 * 128


@pytest.mark.parametrize(
    ("kind", "role", "other"),
    [
        ("stable_diffusion", None, ""),
        ("wuerstchen_prior", "decoder", "wuerstchen_prior/decoder"),
        ("kandinsky22_prior", "decoder", "kandinsky22_decoder"),
        ("kandinsky22_decoder", "prior", "kandinsky22_prior"),
    ],
)
def test_bf16_draws_the_same_pictures_but_for_its_rounding(bases: Bases, tmp_path: Path, kind: str, role: str | None, other: str) -> None:
    name, _, part = other.partition("/")
    beside = {role: str(bases(name) / part)} if role else {}
    for precision in ("fp32", "bf16"):
        options = {**ASKED, **beside, "size": "128", "precision": precision, "out": str(tmp_path / precision)}
        assert sample_job(bases(kind), options) == 0
    fp32, bf16 = (np.asarray(Image.open(tmp_path / name / "image_00000.png")).astype(int) for name in ("fp32", "bf16"))
    assert largest_difference(fp32, bf16) > 0 and np.abs(fp32 - bf16).mean() < 4


@pytest.mark.parametrize(
    ("kind", "companion"),
    [("stable_diffusion", None), ("wuerstchen_prior", "wuerstchen_prior/decoder"), ("kandinsky22_decoder", "kandinsky22_prior")],
)
def test_pipelines_are_made_on_the_host_whatever_the_device(
    bases: Bases, run_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, companion: str | None
) -> None:
    name, _, part = (companion or "").partition("/")
    monkeypatch.setattr(ranks, "device", lambda: torch.device("meta"))
    drawers = [open_drawer(bases(kind), Given(companion=companion and str(bases(name) / part)))]
    drawers += [open_drawer(run_dir, Given())] if companion is None else []
    for drawer in drawers:
        models = [model for each in (drawer.pipeline, drawer.decoder) if each for model in each.components.values()]
        assert {weight.device.type for model in models if isinstance(model, nn.Module) for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["stable_diffusion", "wuerstchen_prior", "kandinsky22_prior"])
def test_a_network_that_still_trains_draws_what_its_finished_run_draws(bases: Bases, tmp_path: Path, kind: str) -> None:
    device, base = torch.device("cpu"), bases(kind)
    companions = {"wuerstchen_prior": lambda: base / "decoder", "kandinsky22_prior": lambda: bases("kandinsky22_decoder")}
    if kind == "stable_diffusion":
        config = recipe({"kind": kind, "base": str(base), "train_text_encoder": True}, adaptation=LORA)
    else:
        config = recipe({"kind": kind, "base": str(base), "decoder": str(companions[kind]())}, adaptation=LORA)
    folder = write_run(tmp_path / "run", config)
    asked_for = ASKED if kind == "stable_diffusion" else {**ASKED, "decoder_steps": STEPS}
    ours, finished = drawn(folder, asked_for), load_finished(folder)
    standing_in = stand_in(finished.trained, network(finished.trained.module), device=device, tick=no_tick)
    tokenizer = finished.trained.tokenizer
    parts = Parts(text_encoder=None if tokenizer is None else TextStandIn(), tokenizer=tokenizer)
    pipeline = assemble(finished.config, standing_in, parts, device=device)
    decoder = load_pipeline(companions[kind](), device=device) if kind in companions else None
    drawer = Drawer(pipeline, decoder, pipeline, picture_side(config, finished.image_size), True)
    assert largest_difference(drawn_by(drawer, asked_for), ours) <= 2


def test_commands_for_models_of_pixels_say_that_they_are(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="is of a latent model, and this wants one of pixels"):
        load_source(run_dir)
