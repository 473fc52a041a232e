"""What a report says of a run's recipe."""

from pathlib import Path

from trainer.config import RunConfig
from trainer.config_io import dump_yaml
from trainer.report.about import facts_of, settings_of


def test_the_role_of_the_data_is_a_fact_and_compared(tmp_path: Path) -> None:
    plain = RunConfig.model_validate({"data": {"shards": "shards/a"}, "train": {"steps": 1}})
    labelled = plain.model_copy(update={"data": plain.data.model_copy(update={"role": "teacher_samples"})})
    (tmp_path / "recipe.yaml").write_text(dump_yaml(labelled))
    assert settings_of(tmp_path)["data.role"] == "teacher_samples"
    assert ("Role of the data", "teacher samples") in facts_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(plain))
    assert settings_of(tmp_path)["data.role"] == "–"
    assert "Role of the data" not in dict(facts_of(tmp_path))


def test_a_single_runs_distill_section_says_nothing_of_it(tmp_path: Path) -> None:
    recipe = RunConfig.model_validate({"data": {"shards": "a"}, "train": {"steps": 1}, "distill": {"start_steps": 8, "updates": 1}})
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    (tmp_path / "identity.json").write_text('{"data.shards sha256": "0123"}')
    settings = settings_of(tmp_path)
    assert settings["data.shards sha256"] == "0123"
    assert not any(key.startswith("distill") for key in settings)
    (tmp_path / "chain.json").touch()
    assert settings_of(tmp_path)["distill.start_steps"] == "8"
