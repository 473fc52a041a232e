"""Recipes: what is read, what is refused and in which words, and that a frozen recipe says everything."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import strict_yaml
from trainer.config import GivenNoiseSchedule, RunConfig, StepDecayLRSchedule, identity, pixel_model, student_counts
from trainer.config_io import RecipeErrors, dump_yaml, json_schema, load_recipe, recipe_path, shipped

LEAST = "data: {shards: shards}\ntrain: {steps: 100}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "FILE").splitlines()


def test_a_least_recipe_takes_every_other_value_from_the_defaults(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, LEAST))
    assert config.train.steps == 100
    assert pixel_model(config).channels == (32, 64, 128, 128)
    assert config.noise_schedule.kind == "cosine_clamped"
    assert config.distill is None


@pytest.mark.parametrize("name", [file.stem for file in shipped("recipes")])
def test_a_frozen_recipe_reloads_to_an_equal_one(name: str, tmp_path: Path) -> None:
    config = load_recipe(recipe_path(name))
    assert load_recipe(write(tmp_path, dump_yaml(config))) == config


def test_the_frozen_smoke_recipe_is_as_committed(golden: Callable[[str, str], None]) -> None:
    golden("smoke_frozen.yaml", dump_yaml(load_recipe(recipe_path("smoke"))))


def test_a_frozen_recipe_names_every_field(tmp_path: Path) -> None:
    tree = strict_yaml.parse(dump_yaml(load_recipe(write(tmp_path, LEAST), ["distill.updates=5"]))).tree
    assert set(tree) == set(RunConfig.model_fields)
    distill = tree["distill"]
    assert isinstance(distill, dict) and distill["lr_schedule"] == {"kind": "linear", "warmup_steps": 0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("'3e-4'", "3e-4"),
        ("2026-01-31", "2026-01-31"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
    ],
)
def test_scalars_are_read_as_people_read_them(text: str, value: object) -> None:
    read = strict_yaml.parse_value(text)
    assert read == value and type(read) is type(value)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=6), plain_values, max_size=4))
def test_whatever_is_written_is_read_back(tree: dict[str, strict_yaml.Plain]) -> None:
    assert strict_yaml.parse(strict_yaml.dump(tree)).tree == tree


def test_overrides_win_over_the_file_and_make_missing_sections(tmp_path: Path) -> None:
    config = load_recipe(
        write(tmp_path, LEAST), ["train.steps=7", "optim.learning_rate=3e-4", "optim.max_gradient_norm=null", "model.channels=[8, 16]",
                                 "model.attention=[false, true]", "model.attention_heads=2"],
    )  # fmt: skip
    assert (config.train.steps, config.optim.learning_rate, config.optim.max_gradient_norm) == (7, 3e-4, None)
    assert pixel_model(config).channels == (8, 16)


def test_another_kind_starts_its_section_anew_wherever_it_stands_among_the_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST + "lr_schedule: {kind: cosine, warmup_steps: 50}\n")
    config = load_recipe(path, ["lr_schedule.every_steps=10", "lr_schedule.factor=0.5", "lr_schedule.kind=step_decay"])
    assert config.lr_schedule == StepDecayLRSchedule(every_steps=10, factor=0.5)
    assert load_recipe(path, ["lr_schedule.kind=cosine"]).lr_schedule.warmup_steps == 50


def test_another_kind_that_shares_its_sections_keys_keeps_them(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST + "engine: {kind: replicated, precision: bf16, deterministic: true}\noptim: {learning_rate: 2e-4}\n")
    config = load_recipe(path, ["engine.kind=fsdp", "optim.kind=adam"])
    assert (config.engine.kind, config.engine.precision, config.engine.deterministic) == ("fsdp", "bf16", True)
    assert (config.optim.kind, config.optim.learning_rate) == ("adam", 2e-4)


def test_a_section_without_a_kind_is_of_the_default_kind(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, LEAST), ["noise_schedule.steps=64", "logging.sample_steps=8"]).noise_schedule.steps == 64


def test_given_betas_count_the_noise_levels(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, LEAST + "noise_schedule: {kind: given, betas: [0.1, 0.2]}\nlogging: {sample_steps: 2}\n"))
    assert isinstance(config.noise_schedule, GivenNoiseSchedule) and config.noise_schedule.steps == 2


def test_the_students_of_a_chain_halve_the_steps(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, LEAST), ["distill.updates=5", "distill.start_steps=63", "distill.end_steps=4"])
    assert config.distill and student_counts(config.distill) == (32, 16, 8, 4)


def test_null_puts_a_section_back_to_its_default(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {shards: x}\nmodel: {kind: ddpm, base: a/b}\ntrain: {steps: 5}\n")
    recipe = load_recipe(path, ["model=null"])
    assert recipe.model == load_recipe(write(tmp_path, "data: {shards: x}\ntrain: {steps: 5}\n")).model
    assert "model" not in recipe.model_fields_set
    with pytest.raises(RecipeErrors, match="no images to train on"):
        load_recipe(path, ["data=null"])


def test_the_sampler_of_a_chain_follows_its_target_unless_given(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST)
    chains = [
        load_recipe(path, ["distill.updates=5", "distill.target=ancestral", *more]).distill for more in ([], ["distill.sampler=ddim"])
    ]
    assert [chain and chain.sampler for chain in chains] == ["ancestral", "ddim"]


# (what the recipe says after the least one, the overrides, the whole list of mistakes)
MISTAKES = {
    "a misspelt section": ("modle: {}", [], ["FILE:3: modle: unknown key - did you mean 'model'?"]),
    "a key's name elsewhere": ("optim: {lr: 3e-4}", [], ["FILE:3: optim.lr: unknown key - did you mean 'optim.learning_rate'?"]),
    "a key of another section": ("batch_size: 8", [], ["FILE:3: batch_size: unknown key - did you mean 'data.global_batch_size'?"]),
    "a key of another kind": (
        "noise_schedule: {kind: cosine, beta_end: 0.02}", [],
        ["FILE:3: noise_schedule.beta_end: unknown key; it belongs to noise_schedule.kind=linear or scaled_linear"],
    ),
    "an unknown kind": (
        "noise_schedule: {kind: cosin}", [],
        ["FILE:3: noise_schedule.kind: got 'cosin', wanted one of linear, scaled_linear, cosine, cosine_clamped, given, base"
         " - did you mean 'cosine'?"],
    ),
    "another library's word": (
        "objective: {prediction: epsilon}", [],
        ["FILE:3: objective.prediction: got 'epsilon', wanted one of v, eps, x_0, base - did you mean 'eps'?"],
    ),
    "a truth value of YAML 1.1": (
        "ema: {warmup: yes}", [], ["FILE:3: ema.warmup: got 'yes', wanted true or false - did you mean true?"]
    ),
    "a number in quotes": (
        "optim: {learning_rate: '3e-4'}", [], ["FILE:3: optim.learning_rate: got '3e-4', wanted a number - did you mean 0.0003?"]
    ),
    "a fraction of a step": (
        "checkpoint: {every_steps: 1e2}", [], ["FILE:3: checkpoint.every_steps: got 100.0, wanted a whole number - did you mean 100?"]
    ),
    "a negative rate": (
        "optim: {learning_rate: -1}", [], ["FILE:3: optim.learning_rate: got -1, wanted more than 0; the default is 0.0006"]
    ),
    "a decay of one": ("ema:\n  decay: 1", [], ["FILE:4: ema.decay: got 1, wanted less than 1; the default is 0.995"]),
    "a value for a section": ("ema: 0.99", [], ["FILE:3: ema: got 0.99, wanted a section: keys below it, such as ema.decay"]),
    "a key twice": ("seed: 1\nseed: 2", [], ["FILE:4: seed: stands twice, first in line 3; remove one"]),
    "a wrong item of a list": (
        "model:\n  channels:\n  - 32\n  - wide", [],
        ["FILE:6: model.channels[1]: got 'wide', wanted a whole number; the default is [32, 64, 128, 128]"]
    ),
    "attention for other levels": (
        "model: {channels: [32, 64]}", [],
        ["FILE:3: model.attention: 4 flags for 2 levels; give one flag per width of model.channels=[32, 64]"]
    ),
    "heads that do not fit": (
        "model: {attention_heads: 3}", [],
        ["FILE:3: model.attention_heads: 3 heads at the width 128 do not fit the attended widths 128; set model.attention_heads=2"],
    ),
    "groups that do not fit": (
        "model: {norm_groups: 24}", [],
        ["FILE:3: model.norm_groups: 24 groups do not divide the width 32, 64, 128, 128; set model.norm_groups=8"],
    ),
    "a batch that does not divide": (
        "", ["data.global_batch_size=250"],
        ["command line:1: data.global_batch_size: 250 is not a multiple of micro_batch_size=16; set data.global_batch_size=256"],
    ),
    "a warm-up longer than the run": (
        "lr_schedule: {warmup_steps: 500}", [],
        ["FILE:3: lr_schedule.warmup_steps: 500 is not below train.steps=100; set lr_schedule.warmup_steps=10"],
    ),
    "updates for other stages": (
        "distill: {start_steps: 8, updates: [1, 2]}", [],
        ["FILE:3: distill.updates: 2 values for 3 stages (students of 4, 2, 1 steps); give 3 values, or one number for all"],
    ),
    "steps that no halving gives": (
        "distill: {start_steps: 100, updates: 5}", [],
        ["FILE:3: distill.start_steps: 100 is not reached by halving the 1000 levels of noise_schedule: "
         "1000, 500, 250, 125, 63, 32, 16, 8, 4, 2, 1; set distill.start_steps=125"],
    ),
    "no value": ("", ["seed="], ["command line:1: seed: no value; write seed=VALUE, or seed=null for none"]),
    "no key": (
        "", ["faster"],
        ["command line:1: faster: not KEY=VALUE; write a dotted key and a value, such as optim.learning_rate=1e-4"],
    ),
    "an override's section": (
        "", ["seed=1", "optimizer.lr=3e-4"],
        ["command line:2: optimizer.lr: unknown key - did you mean 'optim.learning_rate'?"],
    ),
    "an alias": ("ema: &e {}", [], ["FILE:3: anchors and aliases (& and *) are not read; write the value out, or quote the text"]),
    "a tag": (
        "seed: !!python/name:os.system", [],
        ["FILE:3: the tag tag:yaml.org,2002:python/name:os.system is not read; remove it, or quote the text"],
    ),
    "a tab": ("ema:\n\tdecay: 0.9", [], ["FILE:4: not YAML: found character '\\t' that cannot start any token; indent with spaces"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "lines"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_place_and_what_to_write(text: str, overrides: list[str], lines: list[str], tmp_path: Path) -> None:
    assert mistakes_of(write(tmp_path, LEAST + text + "\n"), *overrides) == lines


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "seed: one\ndata: {faces: {style: micha}, batch: 3}\nmodel: {channels: [32, 60]}\ntrain: {steps: many}\n"
        "logging: {sample_steps: 5000}\ndistill: {updates: [1, 2.5]}\n",
    )
    keys = [line.split(": ")[1] for line in mistakes_of(path, "engine.precision=bfloat16")]
    assert keys == [
        "seed", "data.faces.style", "data.batch", "model.norm_groups", "model.attention", "train.steps", "logging.sample_steps",
        "distill.updates[1]", "engine.precision",
    ]  # fmt: skip


def test_a_recipe_without_images_says_which_two_keys_give_some(tmp_path: Path) -> None:
    [line] = mistakes_of(write(tmp_path, "train: {steps: 5}\n"))
    assert line.startswith("FILE:1: data.shards: no images to train on; set data.shards")


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_moments_of_8_bits_are_not_offloaded_and_go_with_every_engine(tmp_path: Path, engine: str) -> None:
    path = write(tmp_path, LEAST)
    assert load_recipe(path, ["optim.kind=adamw_8bit", f"engine.kind={engine}"]).optim.kind == "adamw_8bit"
    lines = mistakes_of(path, "optim.kind=adamw_8bit", f"engine.kind={engine}", "engine.cpu_offload=true")
    assert lines and all("set engine.cpu_offload=false or optim.kind=adamw" in line for line in lines)


def test_a_style_with_attribution_is_refused_until_agreed_to(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {faces: {style: micah}}\ntrain: {steps: 5}\n")
    [line] = mistakes_of(path)
    assert "Micah Lanier must be named" in line and line.endswith("set data.faces.allow_attribution=true")
    assert load_recipe(path, ["data.faces.allow_attribution=true"]).data.faces


def test_an_unknown_recipe_names_the_nearest_or_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"smok: no such recipe file.*did you mean 'smoke'\? \(halfstep recipes lists them\)$"):
        recipe_path("smok")
    with pytest.raises(ValueError, match=r"qqq: no such recipe file.* name \(shipped: .*demo, .*faces_64px, .*smoke"):
        recipe_path("qqq")


def test_bytes_that_are_not_text_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: \xff\n")
    assert mistakes_of(path) == ["FILE:1: not UTF-8 text (byte 6); save the file as UTF-8"]


def test_the_check_also_finds_what_a_copy_with_other_values_breaks() -> None:
    config = load_recipe(recipe_path("smoke"))
    broken = config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})})
    with pytest.raises(ValueError, match=r"10 is not below train.steps=5"):
        broken.check()


def test_identity_leaves_out_what_a_resume_may_change() -> None:
    config = load_recipe(recipe_path("smoke"))
    free = ["engine.kind=replicated", "checkpoint.every_steps=7", "logging.sample_every_steps=0", "data.workers=3", "data.shards=elsewhere",
            "train.steps=600", "train.stop_after_steps=3"]  # fmt: skip
    assert identity(load_recipe(recipe_path("smoke"), free)) == identity(config)
    for kept in ("seed=1", "engine.precision=bf16", "engine.attention=sdpa", "train.compile=true", "data.micro_batch_size=8"):
        assert identity(load_recipe(recipe_path("smoke"), [kept])) != identity(config)


def test_the_schema_describes_every_field_and_is_as_committed(golden: Callable[[str, str], None]) -> None:
    schema = json_schema()
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    for name, section in {**definitions, "RunConfig": schema}.items():
        for key, field in section["properties"].items():
            # pydantic leaves out a description that the section itself repeats
            assert field.get("description") or "$ref" in field, f"{name}.{key} has no docstring"
    golden("../../configs/recipe.schema.json", json.dumps(schema, indent=2) + "\n")


def test_every_shipped_recipe_names_the_schema() -> None:
    for file in shipped("recipes"):
        assert file.read_text().startswith("# yaml-language-server: $schema=../recipe.schema.json\n# ")


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys; from trainer.config_io import *; load_recipe(recipe_path('demo')); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
