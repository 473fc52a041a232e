"""What a report says of a run's recipe."""

from pathlib import Path

from trainer.config import RunConfig
from trainer.config_io import dump_yaml
from trainer.report.about import facts_of, settings_of


def test_the_role_of_the_data_is_a_fact_and_compared(tmp_path: Path) -> None:
    plain = RunConfig.model_validate({"data": {"shards": "shards/a"}, "train": {"steps": 1}})
    labelled = plain.model_copy(update={"data": plain.data.model_copy(update={"role": "teacher_samples"})})
    assert [settings_of(config)["data.role"] for config in (plain, labelled)] == ["–", "teacher_samples"]
    (tmp_path / "recipe.yaml").write_text(dump_yaml(labelled))
    assert ("Role of the data", "teacher samples") in facts_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(plain))
    assert "Role of the data" not in dict(facts_of(tmp_path))
