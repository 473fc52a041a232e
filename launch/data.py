"""A recipe's data before a run starts: faces packed, remote indexes brought into the run's folder and pinned there."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from data_shards.config import INDEX_NAME
from data_shards.files import json_text, read_json_object, replace_file
from data_shards.index import ShardIndex, index_text
from data_shards.remote.cache import ShardCache
from data_shards.remote.fetch import offline_variable
from data_shards.remote.locations import Location
from data_shards.remote.store import open_cache
from launch.shards.actions import pack_source
from trainer.config import DataConfig, FacesConfig, RunConfig
from trainer.config_data import DATA_SHA256, MIXTURE_SHA256

REMOTE_NAME = "remote.json"  # in a run's own data folder: which remote folder of shards is frozen where


def data_folders(config: RunConfig, own: Path) -> list[Path]:
    """The folders of the recipe's indexes, as absolute paths. Faces are packed into `own`, remote indexes are brought there.

    Raises: ValueError or FetchError if a remote index can't be had or trusted; what was brought before needs no network.
    """
    data = config.data
    if not data.places:
        assert data.faces is not None, "the recipe's own check asks for shards or faces"
        return [pack_faces(data.faces, own)]
    cache = None
    folders: list[Path] = []
    for name in data.places:
        location = Location.parse(name)
        if location.is_remote:
            cache = cache or open_cache(data.cache.folder, limit_gib=data.cache.limit_gib)
            folders.append(_brought(location, Path(os.path.abspath(own)), cache))
        else:
            folders.append(Path(os.path.abspath(location.path)))
    if data.role == "teacher_samples":
        _check_drawn(folders)
    return folders


def check_shards(data: DataConfig) -> None:
    """Raises: ValueError if shards on this machine are not there, or damaged."""
    for name in data.places:
        location = Location.parse(name)
        if not location.is_remote:
            ShardIndex.load(location.path)


def _check_drawn(folders: Sequence[Path]) -> None:
    """Raises: ValueError for images that no model has drawn."""
    for folder in folders:
        kind = ShardIndex.load(folder).source.get("kind")
        if kind != "drawn":
            raise ValueError(
                f"data.role=teacher_samples, but the images of {folder} are from {kind}; make the teacher's own first: "
                "halfstep shards draw TEACHER --count N --out SHARDS"
            )


def with_data(config: RunConfig, folders: Sequence[Path], *, run_dir: Path, root: Path) -> RunConfig:
    """The recipe with its data as a RUN_DIR freezes it: folders below `root` as seen from there, others by their absolute path."""
    inside = os.path.abspath(root)
    seen = [os.path.relpath(folder, os.path.abspath(run_dir)) if folder.is_relative_to(inside) else str(folder) for folder in folders]
    if config.data.mixture:
        pairs = zip(config.data.mixture, seen, strict=True)
        update: dict[str, object] = {"mixture": tuple(source.model_copy(update={"shards": name}) for source, name in pairs)}
    else:
        update = {"shards": seen[0]}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def seen_from_here(config: RunConfig, run_dir: Path) -> RunConfig:
    """A frozen recipe with its data as seen from where the command is given: with_data the other way round."""
    places = [Location.parse(name) for name in config.data.places]
    folders = [Path(os.path.abspath(run_dir / place.path)) for place in places if not place.is_remote]
    return with_data(config, folders, run_dir=Path.cwd(), root=run_dir) if len(folders) == len(places) > 0 else config


def data_identity(data: DataConfig, folders: Sequence[Path]) -> dict[str, object]:
    """What of the data must not change on a resume, as dotted keys: each index's sha256, and the weights."""
    hashes = [ShardIndex.load(folder).sha256 for folder in folders]
    if not data.mixture:
        return {DATA_SHA256: hashes[0]}
    weights = [source.weight for source in data.mixture]
    return {MIXTURE_SHA256: hashes, "data.mixture weights": weights}


def pack_faces(faces: FacesConfig, out: Path, *, start: int = 0) -> Path:
    """Pack a recipe's faces, from number `start` on; shards that are there already are kept. Returns the absolute path."""
    from data_shards.sources.faces import FacesSource

    source = FacesSource(style=faces.style, count=faces.count, seed=faces.seed, start=start, allow_attribution=faces.allow_attribution)
    pack_source(source, out, size=faces.size, seed=faces.seed, workers=os.cpu_count() or 1, samples_per_shard=1000)
    return Path(os.path.abspath(out))


def index_folder(name: str, own: Path) -> Path:
    """The folder of one index that a command is given: a folder, or a remote one whose index is brought into `own`.

    Raises: as data_folders; ValueError if the folder is not there."""
    location = Location.parse(name)
    if location.is_remote:
        return _brought(location, Path(os.path.abspath(own)), open_cache(None, limit_gib=None))
    if not location.path.exists():
        raise ValueError(f"{name}: not there; give a folder of shards, or a location such as hf://datasets/OWNER/NAME")
    return location.path


def _brought(location: Location, own: Path, cache: ShardCache) -> Path:
    """A folder below `own` with the index of a remote folder, whose tars stay where they are; the one of the first start is kept."""
    if str(location) != location.secret_text:
        raise ValueError(f"{location}: a user, password or query in data.shards would lie in the run's recipe.yaml; put it into ~/.netrc")
    note = own / REMOTE_NAME
    known = read_json_object(note) if note.exists() else {}
    named = known.get(str(location))
    if isinstance(named, str) and (own / named / INDEX_NAME).exists():
        return own / named
    pinned = _pinned(location, cache)
    index = _remote_index(pinned, cache)
    folder = own / index.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    text = index_text(
        image_size=index.image_size,
        licence=index.licence,
        source=index.source,
        pack=index.pack,
        shards=index.shards,
        derived=index.derived,
        location=index.location or str(pinned),
    )
    replace_file(folder / INDEX_NAME, text)
    replace_file(note, json_text({**known, str(location): folder.name}))
    return folder


def _pinned(location: Location, cache: ShardCache) -> Location:
    """A Hub location with the commit that its revision names now (offline: named when it was last asked), others as they are."""
    if location.scheme != "hf":
        return location
    from data_shards.hub.access import resolve_hub_location

    note = cache.folder / "pins" / hashlib.sha256(str(location).encode()).hexdigest()
    if offline_variable() is not None and note.exists():
        return Location.parse(note.read_text(encoding="utf-8"))
    pinned = resolve_hub_location(str(location))
    note.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(note, pinned)
    return Location.parse(pinned)


def _remote_index(location: Location, cache: ShardCache) -> ShardIndex:
    from data_shards.remote.text import load_remote_text

    text = load_remote_text(location.join(INDEX_NAME), cache)
    return ShardIndex.parse(text, Path(str(location)), where=str(location.join(INDEX_NAME)))
