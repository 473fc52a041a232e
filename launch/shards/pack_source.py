"""The source that a pack's options name; each kind imports what it needs when it is used."""

from collections.abc import Sequence
from pathlib import Path

from data_shards.sources.rows import RowSource
from launch.shards.pack_recipe import PackRecipe


def open_source(recipe: PackRecipe, files: Sequence[str]) -> RowSource:
    """The rows to pack; files: what stands on the command line, besides a data set of the Hub.

    Raises: ValueError saying what is missing, too much, or can't be read."""
    licence = recipe.licence or "not stated"
    if recipe.source in ("faces", "hub") and files:
        what = "faces are drawn here and read no folder" if recipe.source == "faces" else f"the data set is {recipe.repo}"
        hint = "folder" if recipe.source == "faces" else "parquet, tar or folder"
        raise ValueError(f"--source {recipe.source}: {what}, got {files[0]}; did you mean --source {hint}?")
    match recipe.source:
        case "faces":
            from data_shards.sources.faces import FacesSource

            return FacesSource(
                style=recipe.style or "open-peeps",
                count=recipe.count or 6000,
                seed=recipe.seed,
                start=recipe.start or 0,
                allow_attribution=recipe.allow_attribution,
            )
        case "folder":
            from data_shards.sources.folder import FolderSource

            if len(files) != 1:
                raise ValueError("--source folder wants the folder of images: halfstep shards pack --source folder DIR --out OUT")
            return FolderSource.scan(Path(files[0]), licence=licence, skip_bad=recipe.on_bad_row == "skip")
        case "parquet":
            from data_shards.sources.parquet import ParquetSource

            paths = [Path(file) for file in files]
            return ParquetSource.open(paths, image_column=recipe.image_column, text_column=recipe.text_column, licence=licence)
        case "tar":
            from data_shards.sources.foreign_tars import ForeignTarSource

            return ForeignTarSource.open(files, licence=licence)
        case "hub":
            from data_shards.hub.source import HubSource

            assert recipe.repo is not None, "the recipe's own check asks for it"
            return HubSource.open(
                recipe.repo,
                split=recipe.split or "train",
                config=recipe.config,
                revision=recipe.revision,
                image_column=recipe.image_column,
                text_column=recipe.text_column,
                streaming=recipe.streaming,
            )
