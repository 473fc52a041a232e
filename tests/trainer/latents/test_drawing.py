"""`halfstep sample` of models that are told what to draw: options, what they are refused with, and the picture that is written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.latents.finished_runs import PROMPTS, STEPS, Bases, drawn, largest_difference, recipe, write_run
from trainer.export import export_run
from trainer.export_folder import LORA_FILE
from trainer.latents.drawing import Given
from trainer.latents.export import export_latent_run
from trainer.sample import sample_job

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
