"""What a client process of the Hub's stand-in does: reads calls as JSON from stdin, writes their results as JSON to stdout.

The clients read HF_ENDPOINT when they are imported, so they can't run in the process of the tests; importing them takes seconds, so one
process does many calls.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import cast

from data_shards.hub import push
from data_shards.hub.access import resolve_hub_location
from data_shards.hub.source import HubSource
from data_shards.packing.pack import pack
from data_shards.sources.rows import Part, Row, UnreadableRow

ROOT = Path(__file__).parents[2]
Result = dict[str, object]


def run_cases(calls: Mapping[str, Mapping[str, object]], environment: Mapping[str, str]) -> dict[str, Result]:
    """The results of named calls that are done in one process of its own, in order; `error`: type and text of what was raised."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(list(calls.values())),
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))


def told(row: Row | UnreadableRow) -> Result:
    """A row as JSON, its image as a hash."""
    if isinstance(row, UnreadableRow):
        return {"key": row.key, "reason": row.reason, "where": row.where}
    assert isinstance(row.image, bytes)
    known = {"caption": row.caption, "attributes": dict(row.attributes), "extra": dict(row.extra), "where": row.where}
    return {"key": row.key, "image": hashlib.sha256(row.image).hexdigest(), **known}


def _read(source: HubSource, part: Part) -> list[Result]:
    return [told(row) for row in source.read(part, None)]


def _open(*, first: int = 0, rows: int = 25, fork: bool = False, **wanted: object) -> Result:
    source = HubSource.open(**wanted)  # type: ignore[arg-type]
    parts = [Part(part.file, part.first + first, part.count) for part in source.parts(rows)]
    if fork:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            sent = pickle.loads(pickle.dumps(source))  # noqa: S301
            found = [row for part in parts for row in pool.submit(_read, sent, part).result()]
    else:
        found = [row for part in parts for row in _read(source, part)]
    return {"describe": source.describe(), "licence": source.licence(), "parts": len(parts), "rows": found}


def _call(call: dict[str, object]) -> Result:
    token = call.pop("token", None)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = str(token)
    match call.pop("do", "open"):
        case "write":
            Path(str(call["path"])).write_text(str(call["text"]), encoding="utf-8")
            return {}
        case "resolve":
            return {"location": resolve_hub_location(str(call["location"]))}
        case "push":
            push.COMMIT_SHARDS = 1  # 3 shards make 3 commits
            return {"location": push.push_shards(Path(str(call.pop("root"))), **call)}  # type: ignore[arg-type]
        case "pack":
            out, workers = str(call.pop("out")), int(str(call.pop("workers", 1)))
            return {"samples": pack(HubSource.open(**call), out, size=8, workers=workers, part_rows=8).samples}  # type: ignore[arg-type]
        case "ls":
            import fsspec

            system, location = fsspec.filesystem("hf"), str(call["location"])
            names = cast("list[str]", system.find(location, refresh=True))
            return {name: hashlib.sha256(system.cat_file(name)).hexdigest() for name in names}
        case _:
            return _open(**call)  # type: ignore[arg-type]


def main() -> None:
    """Does what stdin says."""
    results: list[Result] = []
    for call in json.load(sys.stdin):
        try:
            results.append(_call(call))
        except (ValueError, OSError, RuntimeError) as error:
            results.append({"error": [type(error).__name__, str(error)]})
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
