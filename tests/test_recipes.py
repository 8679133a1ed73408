"""A DeepSpeed JSON is found by path or by name, from a checkout and from an installed wheel alike."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gdyn.errors import UserError
from gdyn.recipes import bundled, find_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("spelling", ["{}", "{}.json", "ds_configs/{}.json"])
def test_bundled_recipe_is_found_by_name_from_anywhere(elsewhere: Path, spelling: str) -> None:
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        assert find_recipe(spelling.format(file.stem)) == file


def test_users_file_wins_over_a_recipe_of_the_same_name(elsewhere: Path) -> None:
    mine = elsewhere / next(iter(bundled().values())).name
    mine.write_text("{}")
    assert find_recipe(mine.name) == mine


def test_file_beside_the_run_file_wins_over_one_in_the_current_folder(tmp_path: Path, elsewhere: Path) -> None:
    for folder in (tmp_path, elsewhere):
        (folder / "mine.json").write_text("{}")
    assert find_recipe("mine.json", relative_to=tmp_path) == tmp_path / "mine.json"
    assert find_recipe("mine.json") == elsewhere / "mine.json"


@pytest.mark.parametrize("wrong", ["fp23_zero1", "other/{}.json", "{}.yaml", "/nowhere/{}.json"])
def test_unknown_recipe_is_refused_with_the_names_there_are(elsewhere: Path, wrong: str) -> None:
    with pytest.raises(UserError) as refused:
        find_recipe(wrong.format(next(iter(bundled()))))
    assert all(name in str(refused.value) for name in (str(elsewhere), *bundled()))


def test_installed_wheel_carries_the_recipes(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("gdyn", "launch", "ds_configs", "job_templates"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)

    show = "import gdyn, launch, gdyn.recipes as r; print(gdyn.__file__); print(*r.bundled().values(), sep='\\n')"
    shown = subprocess.run(
        [sys.executable, "-c", show],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    names = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
    assert shown == [str(site / "gdyn/__init__.py"), *(str(site / "gdyn/ds_configs" / name) for name in names)]
    assert (site / "gdyn/py.typed").exists()
