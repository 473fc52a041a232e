"""What holds of the code as a whole: imports, what it never calls, what an installed wheel holds, what the README promises."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND_LINES = (ROOT / "launch" / "__main__.py", ROOT / "launch" / "shards_commands.py")
PACKAGES = ("launch", "trainer", "data_shards", "configs", "slurm")
# Each runs code that a file or a text brings along.
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle"}


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


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every call, and line and name of every keyword argument that is true or a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    yield node.lineno, keyword.arg


def test_no_source_unpickles_evaluates_or_trusts_remote_code() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files()
        for line, name in calls(ast.parse(path.read_text()))
        if name in FORBIDDEN_CALLS | FORBIDDEN_KEYWORDS
    ]
    assert found == []


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
