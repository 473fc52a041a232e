"""Whether shards hold what an encoder made: asked before a run that does without it; imports no torch."""

from data_shards.index import ShardIndex

_FROM = {"pooled.npy": "text.npy", "text_mask.npy": "text.npy"}  # made by the same encoder


def check_encoder(index: ShardIndex, extension: str, sha256: str) -> None:
    """Compare the encoder that made a member of shards (latents.npy, text.npy, image.npy) with the one that is wanted.

    sha256: as `encoder_sha256` gives it. Raises: ValueError with what the shards hold, what was wanted, and the mend."""
    name = _FROM.get(extension, extension)
    made = [models[name] for entry in index.derived if isinstance(models := entry.get("models"), dict) and name in models]
    mend = "encode them with that model (halfstep shards encode), or name the model they were encoded with in the recipe"
    if not made:
        raise ValueError(f"{index.root}: holds no {extension} of an encoder; {mend}")
    match made[-1]:
        case {"sha256": str(found), "name": str(model)} if found != sha256:
            raise ValueError(f"{index.root}: its {extension} was made by {model} (sha256 {found[:12]}), wanted {sha256[:12]}; {mend}")
