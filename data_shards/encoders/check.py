"""Whether shards hold what an encoder made: asked before a run that does without it; imports no torch."""

from collections.abc import Collection, Mapping

from data_shards.index import Json, ShardIndex

_FROM = {"pooled.npy": "text.npy", "text_mask.npy": "text.npy"}  # made by the same encoder


def check_encoder(index: ShardIndex, extension: str, sha256: str) -> None:
    """Compare the encoder that made a member of shards (latents.npy, text.npy, image.npy) with the one that is wanted.

    sha256: as `encoder_sha256` gives it. Raises: ValueError with what the shards hold, what was wanted, and the mend."""
    mend = "encode them with that model (halfstep shards encode), or name the model they were encoded with in the recipe"
    match _note(index, extension, mend):
        case {"sha256": str(found), "name": str(model)} if found != sha256:
            raise ValueError(f"{index.root}: its {extension} was made by {model} (sha256 {found[:12]}), wanted {sha256[:12]}; {mend}")
        case _:
            pass


def check_content(index: ShardIndex, extension: str, wanted: Mapping[str, Collection[str]]) -> None:
    """Compare what an encoder noted of its numbers with what a model can be told.

    wanted: the values that serve, by key of the note, such as content or class. Raises: ValueError with both, and the mend."""
    mend = "encode them again with halfstep shards encode"
    note = _note(index, extension, mend)
    for key, values in wanted.items():
        if note.get(key) not in values:
            raise ValueError(f"{index.root}: its {extension} has {key} {note.get(key)!r}, wanted {' or '.join(map(repr, values))}; {mend}")


def _note(index: ShardIndex, extension: str, mend: str) -> Json:
    """What the last encoder that made this member noted of itself."""
    name = _FROM.get(extension, extension)
    made = [models[name] for entry in index.derived if isinstance(models := entry.get("models"), dict) and name in models]
    if not made:
        raise ValueError(f"{index.root}: holds no {extension} of an encoder; {mend}")
    assert isinstance(made[-1], dict), "an encoder's note is an object"
    return made[-1]
