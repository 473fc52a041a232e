"""Where diffusers keeps Wuerstchen's and Kandinsky's classes: a move shows here, with its version, and is mended in one file."""

import importlib
import subprocess
import sys
from pathlib import Path

import diffusers

import trainer

SHIM = "trainer/models/deprecated.py"
SOURCES = Path(trainer.__file__).parents[1]


def test_the_shim_finds_every_class() -> None:
    try:
        shim = importlib.import_module("trainer.models.deprecated")
    except ImportError as error:
        raise AssertionError(
            f"diffusers {diffusers.__version__} has moved or dropped {error.name}: {error}; mend the import in {SHIM}, "
            "the one place that knows, or pin diffusers==0.42.1 in pyproject.toml"
        ) from error
    missing = [name for name in shim.__all__ if not isinstance(getattr(shim, name, None), type)]
    assert not missing, f"diffusers {diffusers.__version__}: {SHIM} lacks {missing}"


def test_no_other_file_imports_them_from_diffusers() -> None:
    needles = ("pipelines.deprecated", "pipelines.kandinsky", "models.transformers.prior_transformer", "scheduling_ddpm_wuerstchen")
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for package in ("trainer", "launch", "data_shards")
        for path in sorted((SOURCES / package).rglob("*.py"))
        if path != SOURCES / SHIM
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("from diffusers", "import diffusers")) and any(needle in line for needle in needles)
    ]
    assert not found, f"import them from {SHIM} instead: {found}"


def test_a_class_that_is_gone_is_named() -> None:
    broken = (
        "import sys; sys.modules['diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior'] = None; "
        "import trainer.models.deprecated"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=SOURCES, check=False)
    assert done.returncode == 1 and "modeling_wuerstchen_prior" in done.stderr
