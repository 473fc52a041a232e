"""Students as tasks: before its first update each is its teacher's function, whatever the stage gives it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.config import Prediction, ProgressiveDistillationConfig, RunConfig, pixel_model
from trainer.config_io import load_recipe
from trainer.descriptor import Descriptor
from trainer.diffusion.parameterization import to_x_0
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar
from trainer.models.attention import use_attention
from trainer.models.network import network
from trainer.models.tiny_unet import build_tiny_unet
from trainer.source import load_source
from trainer.tasks.halving import Halving, build_halving

WriteRun = Callable[..., Path]
STAGES: dict[str, tuple[Prediction, dict[str, object]]] = {
    "half": ("v", {"teacher_steps": 1000, "student_steps": 500}),
    "an odd half": ("v", {"teacher_steps": 125, "student_steps": 63}),
    "a quarter": ("v", {"teacher_steps": 16, "student_steps": 4}),
    "half, eps kept": ("eps", {"prediction": "eps", "teacher_steps": 1000, "student_steps": 500}),
    "the head, eps to v": ("eps", {"teacher_steps": 1000, "student_steps": 1000, "turn_steps": 10}),
    "the head, eps to x_0": ("eps", {"prediction": "x_0", "teacher_steps": 250, "student_steps": 250, "turn_steps": 10}),
    "the head, v to x_0": ("v", {"prediction": "x_0", "teacher_steps": 250, "student_steps": 250, "turn_steps": 10}),
    "the head, x_0 to v": ("x_0", {"teacher_steps": 8, "student_steps": 8, "turn_steps": 10}),
    "half and the head": ("eps", {"teacher_steps": 1000, "student_steps": 500, "turn_steps": 10}),
}


def stage(teacher: Path, values: dict[str, object], **overrides: object) -> tuple[RunConfig, Halving, Callable[[Tensor, Tensor], Tensor]]:
    """A stage's recipe, its halving, and the student's network with its first weights."""
    recipe = load_recipe(teacher / "recipe.yaml", ())
    objective = {"kind": "progressive_distillation", "teacher": str(teacher), **values}
    config = RunConfig.model_validate({**recipe.model_dump(mode="json"), "objective": objective, **overrides})
    assert isinstance(config.objective, ProgressiveDistillationConfig)
    torch.manual_seed(1)
    module = build_tiny_unet(pixel_model(config), 8)
    halving = build_halving(config, config.objective, load_source(teacher), module, build_alpha_bar(config.noise_schedule))
    return config, halving, network(module.requires_grad_(False).eval())


@pytest.mark.parametrize("name", STAGES)
def test_before_its_first_update_a_student_is_its_teachers_function(name: str, write_run: WriteRun, tmp_path: Path) -> None:
    theirs, values = STAGES[name]
    teacher_dir = write_run(tmp_path / "teacher", schedule="linear", prediction=theirs)
    _, halving, student = stage(teacher_dir, values)
    teacher = network(load_source(teacher_dir).model)
    timestep = halving.grid.timestep[:: max(1, len(halving.grid) // 24)]
    timestep = torch.cat([timestep, halving.grid.timestep[-1:]])
    x_t = torch.randn(len(timestep), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_t, sigma_t = (scale.float().view(-1, 1, 1, 1) for scale in alpha_sigma(halving.alpha_bar[timestep.long()]))
    scales = {"alpha_t": alpha_t, "sigma_t": sigma_t}
    ours = to_x_0(halving.as_student(student, 0)(x_t, timestep), x_t, **scales, kind=halving.turn.end)
    wanted = to_x_0(teacher(x_t, timestep), x_t, **scales, kind=theirs)
    # Samplers clip at 1: what lies further out is the same picture.
    torch.testing.assert_close(ours.clamp(-2, 2), wanted.clamp(-2, 2), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in STAGES if "head" in name])
def test_a_head_that_has_not_turned_has_no_error_but_what_the_halving_adds(name: str, write_run: WriteRun, tmp_path: Path) -> None:
    theirs, values = STAGES[name]
    _, halving, student = stage(write_run(tmp_path / "teacher", schedule="linear", prediction=theirs), values)
    stream = torch.Generator().manual_seed(0)
    x_0, noise = torch.rand(32, 3, 8, 8, generator=stream) * 2 - 1, torch.randn(32, 3, 8, 8, generator=stream)
    uniforms = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    losses = [halving.lesson(x_0, noise=noise, uniforms=uniforms, step=step).loss(student) for step in (0, 10)]
    size = halving.lesson(x_0, noise=noise, uniforms=uniforms, step=0).wanted.square().mean().item()
    assert losses[0].mean().item() < (1e-2 if "half" in name else 1e-9) * size
    assert losses[1].mean().item() > 1e-2 * size, "the new head is another function of the same weights"


def test_a_descriptor_names_the_heads_of_its_line(write_run: WriteRun, tmp_path: Path) -> None:
    teacher_dir = write_run(tmp_path / "teacher", prediction="eps")
    kept = stage(teacher_dir, {"prediction": "eps", "teacher_steps": 1000, "student_steps": 500})[1]
    turned = stage(teacher_dir, {"teacher_steps": 1000, "student_steps": 1000, "turn_steps": 10})[1]
    assert (kept.heads, turned.heads) == ((), ("eps", "v"))
    descriptor = load_source(teacher_dir).descriptor.to_json() | {"heads": ["eps", "v"], "prediction_type": "v"}
    assert Descriptor.from_json(descriptor).heads == ("eps", "v")
    assert Descriptor.from_json(descriptor).to_json() == descriptor
    with pytest.raises(ValueError, match=r"heads is \['w'\], wanted a list of v, eps and x_0"):
        Descriptor.from_json(descriptor | {"heads": ["w"]})


@pytest.mark.parametrize(
    ("theirs", "values", "message"),
    [
        ("eps", {"teacher_steps": 1000, "student_steps": 500}, r"objective\.prediction=v, but the teacher .* predicts eps; set"),
        (
            "v",
            {"teacher_steps": 1000, "student_steps": 500, "turn_steps": 3},
            r"turn_steps=3, but the teacher .* predicts v as",
        ),
    ],
)
def test_a_head_that_is_not_the_teachers_turns_and_one_that_is_does_not(
    theirs: Prediction, values: dict[str, object], message: str, write_run: WriteRun, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        stage(write_run(tmp_path / "teacher", prediction=theirs), values)


def test_a_checkpoint_whose_head_still_turns_is_no_model(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=500)  # of 7 steps
    recipe = run_dir / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("turn_steps: null", "turn_steps: 7"))
    load_source(run_dir)
    recipe.write_text(text.replace("turn_steps: null", "turn_steps: 8"))
    with pytest.raises(ValueError, match=r"its head is still turning, until step 8"):
        load_source(run_dir)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_teacher_that_holds_its_weights_in_a_lower_type_computes_the_same_bits(
    precision: str, write_run: WriteRun, tmp_path: Path
) -> None:
    teacher_dir = write_run(tmp_path / "teacher")
    _, halving, _ = stage(teacher_dir, {"teacher_steps": 8, "student_steps": 4}, engine={"precision": precision})
    x_t, timestep = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999.0, 500.0, 20.0, 0.0])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = load_source(teacher_dir).model
    use_attention(model, "sdpa", torch.device("cpu"), dtype=dtype)
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert torch.equal(halving.teacher(x_t, timestep), model(x_t, timestep).sample)


def test_a_teacher_may_compute_in_another_type_than_its_student(write_run: WriteRun, tmp_path: Path) -> None:
    teacher_dir = write_run(tmp_path / "teacher")
    values = {"teacher_steps": 8, "student_steps": 4, "teacher_precision": "fp32"}
    _, halving, _ = stage(teacher_dir, values, engine={"precision": "bf16"})
    x_t, timestep = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999.0, 20.0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = halving.teacher(x_t, timestep)
    assert torch.equal(ours, load_source(teacher_dir).model(x_t, timestep).sample)
