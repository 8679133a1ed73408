"""The house keeps its shape: imports point downward, names shadow nothing, everything written down exists."""

import ast
import configparser
import fnmatch
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdyn import ds_config
from gdyn.cli import COMMANDS
from gdyn.config import parse

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "gdyn").rglob("*.py"), *(ROOT / "launch").glob("*.py")])

LIGHT = {
    *("gdyn", "gdyn.cli", "gdyn.errors", "gdyn.phases", "gdyn.rundir", "gdyn.signals"),
    *("gdyn.learning_rate",),
    *("gdyn.recipes", "gdyn.ds_config", "gdyn.ds_keys", "gdyn.ds_machine"),
    *("gdyn.ranks", "gdyn.launchers", "gdyn.rendezvous", "gdyn.watchdog", "gdyn.failures"),
    *("gdyn.schedulers", "gdyn.supervisor", "gdyn.attempts", "gdyn.processes", "gdyn.planning"),
    *("launch.train", "launch.preflight", "launch.supervise"),
}
"""Need the standard library only to be imported: tested in milliseconds, usable on login nodes, and mpi4py can still be
imported before torch."""

FORBIDDEN = {
    "gdyn.engines.*": ("gdyn.trainer", "gdyn.checkpoints", "gdyn.ranks", "gdyn.config", "launch*"),
    "gdyn.nn.*": ("gdyn.engines*", "gdyn.trainer", "gdyn.ranks", "launch*"),
    "gdyn.trainer": ("gdyn.engines*", "launch*"),
    "gdyn.checkpoints": ("gdyn.engines*", "gdyn.trainer", "launch*"),
    "gdyn.loader": ("gdyn.engines*", "gdyn.trainer", "launch*"),
    "gdyn.ranks": ("gdyn.engines*", "gdyn.trainer", "gdyn.config", "launch*"),
}
"""Importer -> what it never imports, not even inside a function."""

AT_THE_ROOT = {
    *("launch", "gdyn", "ds_configs", "job_templates", "examples", "benchmarks", "tests"),
    *("setup.cfg", "pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("CITATION.cff", "constraints.txt", ".ci", ".gitignore", ".pre-commit-config.yaml"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in SOURCES}


def imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    """Imported modules; with `lazy`, those inside functions too. What only a type checker sees does not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            # `from gdyn import recipes` imports a module, `from gdyn.recipes import bundled` a name
            full = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in full)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, lazy)


@pytest.mark.parametrize("name", sorted(LIGHT & MODULES.keys()))
def test_light_module_imports_the_standard_library_only(name: str) -> None:
    strangers = {
        found
        for found in imports(MODULES[name], lazy=False)
        if found not in LIGHT and found.partition(".")[0] not in sys.stdlib_module_names
    }
    assert not strangers


@pytest.mark.parametrize("importer", sorted(MODULES))
def test_imports_point_downward(importer: str) -> None:
    banned = [found for pattern, words in FORBIDDEN.items() if fnmatch.fnmatch(importer, pattern) for found in words]
    own_family = ".".join(importer.split(".")[:3])
    if importer.startswith("gdyn.engines."):
        # engines know nothing of each other
        banned += [f"{family}*" for family in families() if family != own_family]
    if importer.partition(".")[0] == "gdyn" and importer != "gdyn.cli":
        banned.append("launch*")
    found = set(imports(MODULES[importer], lazy=True))
    assert not {name for name in found for pattern in banned if fnmatch.fnmatch(name, pattern)}


def families() -> set[str]:
    return {".".join(name.split(".")[:3]) for name in MODULES if name.startswith("gdyn.engines.")}


def test_imports_have_no_cycle() -> None:
    graph = {name: {*imports(tree, lazy=False)} & MODULES.keys() - {name} for name, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_submitting_a_job_does_not_import_torch() -> None:
    reached, todo = set[str](), {"launch.submit"} & MODULES.keys()
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= set(imports(MODULES[name], lazy=False)) & MODULES.keys() - reached
    assert not {found for name in reached for found in imports(MODULES[name], lazy=False) if found.startswith("torch")}


def test_file_names_in_launch_shadow_nothing() -> None:
    installed = importlib.metadata.packages_distributions().keys() - {"launch"}
    names = {path.stem for path in (ROOT / "launch").iterdir() if not path.stem.startswith("__")}
    assert not names & (sys.stdlib_module_names | installed)


def test_depth_never_exceeds_an_engines_file() -> None:
    assert all(
        len(path.relative_to(ROOT / "gdyn").parts) <= 3 for path in SOURCES if path.is_relative_to(ROOT / "gdyn")
    )


def test_map_of_the_package_names_every_module() -> None:
    lines = (ast.get_docstring(MODULES["gdyn"]) or "").splitlines()[2:]
    mapped = {name for line in lines for name in line.split("  ")[0].split(", ")}
    assert mapped == {name.split(".")[1] for name in MODULES if name.startswith("gdyn.")}


def test_setup_cfg_lists_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    code = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert sorted(listed) == sorted(code | {"gdyn.ds_configs", "gdyn.job_templates"})


def test_every_pinned_version_is_of_a_dependency() -> None:
    """constraints.txt pins what setup.cfg asks for, and all of it but the extra that no test installs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name: text for name, text in setup["options.extras_require"].items() if name != "wandb"}
    wanted = "\n".join([setup["options"]["install_requires"], *extras.values()])
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert sorted(pinned) == sorted(set(re.findall(r"^([\w-]+)(?=[\[>])", wanted, re.MULTILINE)))


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_recipe_parses_and_states_gradient_clipping(path: Path) -> None:
    # DeepSpeed 0.19.8 clips at 1.0 where the JSON is silent
    assert "gradient_clipping" in json.loads(path.read_text())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_run_file_of_an_example_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(["--config", str(path)]).config.plan.epochs > 0


@pytest.mark.parametrize(
    "path",
    [
        *("README.md", "CONTRIBUTING.md", "gdyn/DESIGN.md", "benchmarks/README.md"),
        *("job_templates/README.md", "job_templates/TROUBLESHOOTING.md", "gdyn/engines/diffusion/README.md"),
    ],
)
def test_document_names_only_what_exists(path: str) -> None:
    text = (ROOT / path).read_text()
    assert set(re.findall(r"(?:`|^)gdyn ([a-z-]+)", text, re.MULTILINE)) <= COMMANDS.keys()
    folders = "launch|gdyn|ds_configs|job_templates|examples|benchmarks|tests"
    files = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w", text)
    assert [name for name in files if not (ROOT / name).exists() and "/data" not in name] == []
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("path", ["README.md", "gdyn/engines/diffusion/README.md"])
def test_run_files_of_a_readme_parse(path: str, tmp_path: Path) -> None:
    text = (ROOT / path).read_text()
    # The DeepSpeed JSON that run files name lies beside them.
    recipes = dict(
        zip(
            sorted(set(re.findall(r"^deepspeed: (.*\.json)", text, re.MULTILINE))),
            re.findall(r"```json\n(.*?)```", text, re.DOTALL),
            strict=True,
        )
    )
    for name, recipe in recipes.items():
        (tmp_path / name).write_text(recipe)
    run_files = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert run_files
    for run_file in run_files:
        (tmp_path / "run.yaml").write_text(run_file)
        config = parse(["--config", str(tmp_path / "run.yaml")]).config
        assert config.plan.epochs > 0
        assert ds_config.complete(ds_config.read(config.deepspeed), config.optimization, total_steps=100)


def test_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"(?:`|^)gdyn ([a-z-]+)", text, re.MULTILINE)) == COMMANDS.keys()


def tracked_files() -> list[Path]:
    """What git holds or would hold. Skips outside a git checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_nothing_else_lies_at_the_root() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= AT_THE_ROOT


def test_no_file_knows_where_it_was_written() -> None:
    texts = (
        path for path in tracked_files() if path.is_file() and path.suffix in {".py", ".md", ".json", ".yaml", ".cfg"}
    )
    assert [path for path in texts if f"{ROOT}/" in path.read_text()] == []
