"""What holds of the code as a whole: imports, what it never calls, what an installed wheel holds, what the README promises."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SHARDS = (ROOT / "launch" / "shards" / name for name in ("commands.py", "pack_command.py", "derive_commands.py"))
COMMAND_LINES = (ROOT / "launch" / "__main__.py", *_SHARDS)
PACKAGES = ("launch", "trainer", "data_shards", "configs", "slurm")
# Each runs code that a file, a text or another rank brings along. A name without a dot is Python's own function.
FORBIDDEN_CALLS = {"eval", "exec", "compile"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package"}
FORBIDDEN_NAMES = {
    "torch.load",  # but for calls with weights_only=True
    "torch.serialization.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.hub.load",
    "torch.utils.model_zoo.load_url",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.Loader",
    "yaml.CLoader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "os.system",
    "os.popen",
    # torch.distributed.checkpoint unpickles .metadata and every entry that is no tensor.
    "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.load_state_dict",
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.filesystem.FileSystemReader",
}
# Of any object: torch.distributed's collectives that unpickle what other ranks sent, and DeepSpeed's own checkpoints.
FORBIDDEN_METHODS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "load_checkpoint",
    "load_universal_checkpoint",
    "read_pickle",
}
# What is measured are other libraries' own saves, on files that the benchmark has just written.
MEASURED = {"benchmarks/checkpoint.py: torch.distributed.checkpoint.load", "benchmarks/checkpoint.py: peer.deepspeed.load_checkpoint"}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle", "custom_pipeline"}


def python_files() -> list[Path]:
    return sorted(path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py"))


def python(code: str, **environment: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize(
    "module", ["launch.__main__", "launch.start", "launch.demo", "launch.status", "launch.worker", "trainer.config_io"]
)
def test_the_launching_side_imports_no_torch(module: str) -> None:
    heavy = python(f"import sys, {module}; print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])")
    assert heavy == "[]"


def test_the_packages_imported_are_those_of_this_project() -> None:
    files = python("import launch, trainer, data_shards; print(launch.__file__, trainer.__file__, data_shards.__file__)")
    assert files.split() == [str(ROOT / name / "__init__.py") for name in ("launch", "trainer", "data_shards")]


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"]
    ran = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a module that could run code from a file, under whatever name it was imported."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported |= {alias.asname: alias.name for alias in names if alias.asname}
                yield from ((node.lineno, alias.name) for alias in names if _is_forbidden(alias.name))
            case ast.ImportFrom(module=str(module), names=names):
                imported |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names if _is_forbidden(f"{module}.{alias.name}"))
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, imported)
            literal = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and literal.get("weights_only") == "True":
                allowed.add(node.func)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, name
            yield from (
                (node.lineno, keyword) for keyword in literal if keyword in FORBIDDEN_KEYWORDS and literal[keyword] not in ("False", "None")
            )
        elif isinstance(node, ast.Attribute | ast.Name) and node not in allowed:
            name = _dotted(node, imported)
            if "." in name and _is_forbidden(name):
                yield node.lineno, name


def _dotted(node: ast.AST, imported: Mapping[str, str]) -> str:
    """A reference's full name, as far as it is made of names."""
    head, _, rest = ast.unparse(node).partition(".")
    return ".".join(filter(None, [imported.get(head, head), rest]))


def _is_forbidden(name: str) -> bool:
    in_module = any(name == module or name.startswith(f"{module}.") for module in FORBIDDEN_MODULES)
    return in_module or name in FORBIDDEN_NAMES or name.rpartition(".")[2] in FORBIDDEN_METHODS


def test_no_source_unpickles_evaluates_or_trusts_remote_code() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files()
        for line, name in unsafe(ast.parse(path.read_text()))
        if f"{path.relative_to(ROOT)}: {name}" not in MEASURED
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=safe)",
        "import torch; load = torch.load",
        "import torch as t; t.load(path)",
        "from torch import load as read; read(path)",
        "import torch; torch.jit.load(path)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from dill import load",
        "import joblib.numpy_pickle",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import numpy as np; np.load(path, allow_pickle=flag)",
        "import pandas; pandas.read_pickle(path)",
        "import yaml; yaml.load(text, yaml.SafeLoader)",
        "from yaml import unsafe_load; unsafe_load(text)",
        "import yaml; class_ = yaml.UnsafeLoader",
        "import torch.distributed as dist; dist.all_gather_object(out, value)",
        "from torch.distributed import broadcast_object_list",
        "import torch.distributed.checkpoint as dcp; dcp.load(state, checkpoint_id=path)",
        "from torch.distributed.checkpoint import FileSystemReader",
        "engine.load_checkpoint(path)",
        "DiffusionPipeline.from_pretrained(path, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(path, custom_pipeline='x')",
        "eval(text)",
        "import os; os.system(text)",
    ],
)
def test_each_unsafe_way_would_be_found(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


def test_safe_ways_are_not_found() -> None:
    code = """
import numpy as np, torch, yaml
from torch.distributed.checkpoint import DefaultSavePlanner
torch.load(path, map_location="cpu", weights_only=True)
np.load(path, allow_pickle=False)
yaml.compose(text, yaml.SafeLoader)
module.compile()
re.compile(text)
"""
    assert list(unsafe(ast.parse(code))) == []


def test_every_module_says_its_duty_in_one_line() -> None:
    silent = [str(path.relative_to(ROOT)) for path in python_files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def documented_commands() -> list[str]:
    """Every `halfstep ...` of the README and of the commands' own examples, without comments."""
    texts = [path.read_text() for path in (ROOT / "README.md", *COMMAND_LINES, ROOT / "launch" / "demo.py")]
    found = re.findall(r"(?:^|`|Example:  |\$ |^ {2,8})(halfstep [a-z][^`#\n\"]*)", "\n".join(texts), flags=re.MULTILINE)
    return sorted({re.sub(r"\{[a-z_]+\}", "x", command).strip(" ,.;") for command in found if "{" not in command.split()[1]})


def test_every_documented_command_and_option_exists() -> None:
    commands = documented_commands()
    assert len(commands) > 8
    unknown = []
    helps: dict[tuple[str, ...], str] = {}
    for command in commands:
        words = shlex.split(command)[1:]
        verb = tuple(words[: 2 if words[0] == "shards" else 1])
        if verb not in helps:
            code = f"import sys; sys.argv = ['halfstep', *{list(verb)!r}, '--help']; from launch.__main__ import main; main()"
            ran = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
            )
            helps[verb] = ran.stdout if ran.returncode == 0 else ""
        unknown += [f"{command}: {word}" for word in words if word.startswith("--") and word not in helps[verb]]
        unknown += [] if helps[verb] else [command]
    assert unknown == []


def test_every_command_has_help_with_an_example() -> None:
    nodes = [node for path in COMMAND_LINES for node in ast.parse(path.read_text()).body]
    verbs = [node for node in nodes if isinstance(node, ast.FunctionDef) and ".command" in " ".join(map(ast.unparse, node.decorator_list))]
    assert len(verbs) >= 15
    assert [verb.name for verb in verbs if "Example:  halfstep " not in (ast.get_docstring(verb) or "")] == []


def test_an_installed_wheel_brings_recipes_clusters_and_slurm_files(tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True, capture_output=True)
    [wheel] = wheels.glob("halfstep-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    code = (
        "import sys, importlib.resources as r, trainer\n"
        "from launch.__main__ import main\n"
        "files = [r.files('slurm') / 'README.md', r.files('configs') / 'clusters' / 'local.yaml']\n"
        "print(trainer.__file__, *(file.is_file() for file in files))\n"
        "sys.argv = ['halfstep', 'recipes']\n"
        "main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)}, check=True
    )
    first, *listed = ran.stdout.splitlines()
    assert first == f"{site / 'trainer' / '__init__.py'} True True"
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))
    assert (site / "bin" / "halfstep").is_file()


def test_constraints_pin_every_dependency_and_torch_exactly() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = [*project["dependencies"], *(need for needs in project["optional-dependencies"].values() for need in needs)]
    names = {re.split(r"[\[<>=~ ]", need)[0].lower().replace("_", "-") for need in wanted} - {"halfstep"}
    assert names - set(pins) == set()
    assert pins["torch"] == "2.13.0"
    assert "torch>=2.11" in project["dependencies"]
