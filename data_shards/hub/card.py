"""The data set card of pushed shards: what is in them, whose it is, how it was made, and how to read it."""

import re
from collections.abc import Iterable, Mapping

import yaml

from data_shards.config import CAPTION_EXTENSION, INDEX_NAME, is_image
from data_shards.index import ShardIndex

MARK = "<!-- written by `halfstep shards push`; without this line a later push leaves the card alone -->"
# our names and the Hub's identifiers, in lower case
CC_LICENCES = ("cc-by", "cc-by-sa", "cc-by-nc", "cc-by-nd", "cc-by-nc-sa", "cc-by-nc-nd")
OTHER_LICENCES = (
    "cc0-1.0",
    "mit",
    "apache-2.0",
    "bsd-3-clause",
    "odc-by",
    "pddl",
    "odbl",
    "openrail",
    "creativeml-openrail-m",
    "unlicense",
)
HUB_LICENCES = frozenset((*OTHER_LICENCES, *(f"{name}-{version}" for name in CC_LICENCES for version in ("2.0", "3.0", "4.0"))))
UNKNOWN_LICENCES = frozenset(("", "unknown", "not stated", "none"))
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def licence_note(index: ShardIndex) -> str | None:
    """What the one who pushes must know of the licence; None if it is a known one that lets everybody share the images."""
    name = str(index.licence.get("name") or "")
    if name.lower() in UNKNOWN_LICENCES:
        return "the licence of these images is not stated: share them only if you may; `halfstep shards pack --licence NAME` states it"
    if "-nd" in name.lower():
        return f"the images are under {name}, which does not let changed copies be shared; packing crops and scales"
    if name.lower() not in HUB_LICENCES:
        return f"the images are under {name}, which halfstep does not know: read whether it lets you share them"
    return None


def size_category(samples: int) -> str:
    """The Hub's tag for a number of rows."""
    return next((name for limit, name in SIZES if samples < limit), "10M<n<100M" if samples < 10**8 else "n>100M")


def card_text(index: ShardIndex, repo: str) -> str:
    """README.md of the repository: YAML that the Hub reads, then text for people."""
    name = str(index.licence.get("name") or "not stated")
    url = index.licence.get("url")
    header: dict[str, object] = {
        "pretty_name": repo.rpartition("/")[2],
        "license": name.lower() if name.lower() in HUB_LICENCES else "unknown" if name.lower() in UNKNOWN_LICENCES else "other",
    }
    if header["license"] == "other":
        header |= {"license_name": _slug(name)} | ({"license_link": url} if isinstance(url, str) and url else {})
    header |= {
        "task_categories": ["text-to-image"],
        "tags": ["webdataset", "image", "halfstep"],
        "size_categories": [size_category(index.samples)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
    }
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    sections = [f"# {_plain(repo)}", MARK, _content(index), _licence(index), _making(index), _usage(index, repo)]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _content(index: ShardIndex) -> str:
    captions = sum(_having(shard.members[CAPTION_EXTENSION].sizes) for shard in index.shards if CAPTION_EXTENSION in shard.members)
    extensions = sorted({extension for shard in index.shards for extension in shard.members})
    side = f"{index.image_size} x {index.image_size} pixels" if index.image_size else "of several sizes"
    what = f"{index.samples:,} images, {side}" if any(is_image(one) for one in extensions) else f"{index.samples:,} samples without images"
    total = sum(shard.size_bytes for shard in index.shards)
    lines = [
        f"- {what}; {captions:,} with a caption",
        f"- {len(index.shards):,} WebDataset shards, {total / 2**30:.2f} GiB; members: {' '.join(f'`.{one}`' for one in extensions)}",
        f"- `{INDEX_NAME}` lists every sample and every shard's sha256; its own is `{index.sha256}`",
    ]
    return "\n".join(lines)


def _licence(index: ShardIndex) -> str:
    licence, url = index.licence, index.licence.get("url")
    name = _plain(licence.get("name") or "not stated")
    lines = ["## Licence", "", f"The images: {f'[{name}]({_plain(url)})' if isinstance(url, str) and url else name}."]
    creators = licence.get("creators")
    if isinstance(creators, list) and creators:
        asked = ", to be named wherever they are used" if licence.get("attribution_required") else ""
        lines.append(f"By {', '.join(map(_plain, creators))}{asked}.")
    text, note = licence.get("text"), licence_note(index)
    lines += [_plain(text)] if isinstance(text, str) and text else []
    lines += [f"Note: {_plain(note)}."] if note else []
    return "\n".join(lines)


def _making(index: ShardIndex) -> str:
    lines = ["## How they were made", "", f"- source: {_told(index.source)}", f"- packed: {_told(index.pack)}"]
    lines += [f"- then: {_told(entry)}" for entry in index.derived]
    if not index.derived:
        lines.append("- captions and attributes are the source's own")
    return "\n".join(lines)


def _usage(index: ShardIndex, repo: str) -> str:
    image = next((one for shard in index.shards for one in sorted(shard.members) if is_image(one)), "json")
    first, last = index.shards[0].name, index.shards[-1].name
    return f"""## Use

With halfstep, where only the shards that a rank needs are fetched:

```
halfstep train RECIPE data.shards=hf://datasets/{repo}
```

With WebDataset, any member by its extension; the shards are `{first}` to `{last}`:

```python
import webdataset
from huggingface_hub import snapshot_download
from pathlib import Path

folder = Path(snapshot_download("{repo}", repo_type="dataset"))
samples = webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False).decode("pil")
for sample in samples:
    print(sample["__key__"], sample["{image}"].size)
    break
```

With `datasets`: `load_dataset("{repo}", split="train", streaming=True)`."""


def _told(entry: Mapping[str, object]) -> str:
    """The plain values of an entry, as `kind faces, count 30`."""
    told = [
        f"{key.replace('_', ' ')} {_plain(value)}" for key, value in entry.items() if isinstance(value, str | int | float) and value != ""
    ]
    return ", ".join(told) or "nothing is known"


def _plain(value: object) -> str:
    """Text that stays on its line and is no markup."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("[", "(").replace("]", ")")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "other"


def _having(sizes: Iterable[int]) -> int:
    return sum(size >= 0 for size in sizes)
