"""The README's section "On a cluster": every command does what it says, on a machine without a scheduler."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gdyn.rundir import RunDir, write_json
from tests import harness, runs
from tests.test_comparison import write_run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("## On a cluster\n")[2].partition("\n## ")[0]
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^gdyn .*", SECTION, re.MULTILINE)]
SUBMIT = [command for command in COMMANDS if command.startswith("gdyn submit")]
OPTIONS = re.findall(r"^\| `(--[^`]+)` \|", SECTION, re.MULTILINE)


def run(command: str, *more: str) -> int:
    """As a shell would, without one; returns the exit code."""
    _, program, *words = shlex.split(command)
    words = [name for word in words for name in sorted(map(str, Path().glob(word))) or [word]]
    return int(importlib.import_module(f"launch.{program.replace('-', '_')}").main([*words, *more]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody has run.yaml, a job script, and two runs."""
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load((ROOT / "examples/alanine_dipeptide/run.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump(example | {"run_dir": "runs/first"}))
    shutil.copy(ROOT / "tests/job_scripts/frontier.sbatch", "my_job.sbatch")
    for name in ("first", "second"):
        starts = [{"seconds": 3600.0, "nodes": 2, "samples": 10**6}]
        checkpoints = write_run(Path("runs", name), scores=[0.1 * i for i in range(8)], starts=starts) / "checkpoints"
        (checkpoints / "latest").write_text("whole\n")
        (checkpoints / "whole").mkdir()
        write_json(checkpoints / "whole/position.json", {})
        save_file({"weight": torch.zeros(1000)}, checkpoints / "whole/weights.safetensors")
    return tmp_path


def test_the_section_has_the_commands_and_options_it_is_about() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"submit", "compare", "lint-job"}
    wanted = ["--dry_run", "--plan", "--chain", "--requeue", "--array", "--spares", "--set"]
    assert [option.split()[0] for option in OPTIONS] == wanted
    assert len(SUBMIT) == 2


@pytest.mark.parametrize("option", ["", *OPTIONS])
@pytest.mark.parametrize("command", SUBMIT)
def test_each_submission_is_accepted_by_the_site(
    command: str, option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queues = "workstation" not in command
    code = run(command, *option.split(), *([] if option == "--plan" else ["--dry_run"]))
    shown = capsys.readouterr()
    if not queues and option.split()[:1] in (["--chain"], ["--requeue"], ["--spares"]):
        assert code == 2  # there is one machine, and nothing to wait in
        return
    assert code == 0, shown.err
    if option == "--plan":
        assert "node-h/epoch" in shown.out and "measured" in shown.out
    else:
        assert "supervise.py" in shown.out and "global batch" in shown.err
    assert not Path("runs/first/job").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in SUBMIT])
def test_the_other_commands_run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_on_a_workstation_the_job_starts_at_once_and_leaves_what_is_said(tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run", split=(2, 1))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    [command] = [command for command in SUBMIT if "workstation" in command]
    words = shlex.split(command)[2:]
    ended = harness.launch([sys.executable, ROOT / "launch/submit.py", *words], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    run_dir = RunDir(Path(config.run_dir))
    assert json.loads(run_dir.status_json.read_text())["state"] == "done"
    table = README.partition("## What a run leaves behind\n")[2].partition("```")[0]
    said = [
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    ]
    assert [name for name in said if not (run_dir.path / name).exists()] == ["failure.json"]
    files = {path.name for path in run_dir.job.iterdir()}
    assert {"job.sh", "run.yaml", "deepspeed.json", "submission.json", "attempts.jsonl"} <= files
