"""gdyn compare reads any run, says what differs, and computes what NumPy computes."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from gdyn import comparison
from gdyn.comparison import compare
from gdyn.errors import MissingFile, UserError
from gdyn.rundir import DONE, FAILED, RunDir, write_json
from launch.compare import main
from tests import runs

HOUR = 3600.0


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(seconds))


def write_run(
    folder: Path,
    scores: Sequence[float] = (0.1, 0.3, 0.2),
    *,
    metric: str = "vamp2",
    starts: Sequence[dict[str, Any]] = ({"seconds": HOUR, "nodes": 2},),
    state: str | None = "done",
    engine: str = "Vamp",
    engine_keys: dict[str, Any] | None = None,
    stage: int = 0,
    **keys: Any,
) -> Path:
    """A run folder as training leaves it, with one epoch of 10 steps per score."""
    (folder / "checkpoints").mkdir(parents=True)
    init_args = {"tau": 5, "train": ["data/train"]} if engine_keys is None else engine_keys
    run_file = {
        "engine": {"class_path": engine, "init_args": init_args},
        "run_dir": str(folder),
        "deepspeed": str(folder / "recipe.json"),
        "phases": [{"objective": metric, "epochs": 3}],
        "seed": 1,
        "optimization": {"batch_size": 48},
        **keys,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file, sort_keys=False))
    micro_batch = run_file["optimization"]["batch_size"]
    write_json(
        folder / "deepspeed.json",
        {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}},
    )
    lines = []
    for epoch, score in enumerate(scores):
        place = {"step": 10 * (epoch + 1), "phase": metric, "epoch": epoch}
        lines.append(place | {"split": "train", "loss": -score, "samples_per_second": 100.0 + epoch})
        lines.append(place | {"split": "validation", metric: score, "loss": -score, "other": 10 * score})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scores:
        best = int(numpy.argmax(scores))
        entry = {"tag": f"p0-{metric}-e{best}", "score": scores[best], "epoch": best + 1}
        write_json(folder / "checkpoints" / "best.json", {metric: entry})
    now = time.time()
    entries = [{"time": clock(now - 9 * HOUR + i), "world_size": 16, "git_commit": "abc"} for i in range(len(starts))]
    write_json(folder / "provenance.json", [entry | start for entry, start in zip(entries, starts, strict=True)])
    if state is not None:
        RunDir(folder).write_status({"done": DONE, "failed": FAILED}[state], "because")
    if state == "done":
        write_json(folder / "summary.json", {"world_size": 16, "test": {metric: max(scores) - 0.05}})
    return folder


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def test_seed_ensemble_differs_in_its_seed_alone(tmp_path: Path) -> None:
    scores = [0.31, 0.29, 0.35, 0.30]
    folders = [write_run(tmp_path / f"seed{i}", [0.1, score], seed=i) for i, score in enumerate(scores)]
    text = compare(folders, tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == [
        *("run", "state", "seed", "vamp2 best", "vamp2 last", "vamp2 test"),
        *("epochs done", "planned", "steps", "samples/s", "ranks", "nodes", "node-hours"),
    ]
    assert [float(row["vamp2 best"]) for row in rows] == scores
    columns = comparison.table(found := [comparison.read_run(f, f.name) for f in folders], {}, ["vamp2"])
    statistics = comparison.ensemble_statistics(columns, comparison.config_differences(found))
    expected = [numpy.mean(scores), numpy.std(scores, ddof=1), min(scores), max(scores)]
    assert [row["vamp2 best"] for row in statistics] == pytest.approx(expected)
    assert [line.split()[:2] for line in text.splitlines()[-4:]] == [
        *(["mean", "of"], ["standard", "deviation"], ["min", "of"], ["max", "of"])
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_two_configurations_are_two_ensembles(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{size}-{seed}", [size / 100 + seed], seed=seed, optimization={"batch_size": size})
        for size in (32, 64)
        for seed in (1, 2)
    ]
    text = compare(folders, tmp_path)
    # ds.train_micro_batch_size_per_gpu says the same as optimization.batch_size and is not shown.
    assert list(rows_of(tmp_path)[0])[:5] == ["run", "state", "seed", "optimization.batch_size", "vamp2 best"]
    means = [line.split() for line in text.splitlines() if line.startswith("mean of 2")]
    assert [(line[3], float(line[4])) for line in means] == [("32", 1.82), ("64", 2.14)]


def test_difference_of_the_deepspeed_json_is_shown(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"zero{stage}", stage=stage) for stage in (0, 1)]
    compare(folders, tmp_path)
    assert [row["ds.zero_optimization.stage"] for row in rows_of(tmp_path)] == ["0", "1"]


def test_run_without_its_deepspeed_json_yet_does_not_differ_in_it(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"seed{i}", seed=i) for i in (1, 2)]
    (folders[1] / "deepspeed.json").unlink()
    compare(folders, tmp_path)
    assert list(rows_of(tmp_path)[0])[2:5] == ["deepspeed", "seed", "vamp2 best"]


def test_runs_that_do_not_differ_show_no_key_and_no_ensemble(tmp_path: Path) -> None:
    text = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path)
    assert list(rows_of(tmp_path)[0])[:3] == ["run", "state", "vamp2 best"]
    assert "mean" not in text


def test_engines_compare_on_what_they_share(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "ours", engine_keys={"tau": 5, "cutoff": 6.0})
    other = write_run(tmp_path / "other", metric="elbo", engine="Monodecoder", engine_keys={"tau": 9, "codes": 64})
    text = compare([ours, other], tmp_path)
    first, second = rows_of(tmp_path)
    assert {key for key in first if key.startswith("engine")} == {"engine", "engine.tau"}
    assert (first["vamp2 best"], first["elbo best"]) == ("0.3", "")
    assert (second["vamp2 best"], second["elbo best"]) == ("", "0.3")
    assert "-" in text
    compare([ours, other], tmp_path, "other")
    assert [float(row["other last"]) for row in rows_of(tmp_path)] == [2.0, 2.0]
    assert [float(row["other best"]) for row in rows_of(tmp_path)] == [3.0, 3.0]  # at the objective's best epoch


def test_running_failed_and_silent_runs_compare(tmp_path: Path) -> None:
    now = time.time()
    running = write_run(tmp_path / "running", [0.1], state=None, starts=[{"nodes": 4, "time": clock(now - HOUR)}])
    write_json(running / "heartbeat.json", {"time": now - 1})
    failed = write_run(tmp_path / "failed", [0.2, 0.1], state="failed")
    silent = write_run(tmp_path / "silent", [0.1], state=None, starts=[{"nodes": 1}])
    os.utime(silent / "metrics.jsonl", times=(now - 7 * HOUR, now - 7 * HOUR))
    restarted = write_run(tmp_path / "restarted", [0.1], starts=[{"nodes": 1, "seconds": HOUR}, {"nodes": 1}])
    write_json(restarted / "status.json", {"state": "failed", "time": clock(now - 9 * HOUR - 60)})
    write_json(restarted / "heartbeat.json", {"time": now - 2})
    only_verdict = tmp_path / "only_verdict"
    only_verdict.mkdir()
    RunDir(only_verdict).write_status(FAILED, "no data")
    compare([running, failed, silent, restarted, only_verdict], tmp_path)
    rows = {row["run"]: row for row in rows_of(tmp_path)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "running": "running",
        "failed": "failed",
        "silent": "silent",
        "restarted": "running",
        "only_verdict": "failed",
    }
    assert float(rows["running"]["node-hours"]) == pytest.approx(4, abs=0.01)
    assert float(rows["silent"]["node-hours"]) == pytest.approx(2, abs=0.01)
    assert (rows["failed"]["vamp2 best"], rows["failed"]["vamp2 last"]) == ("0.2", "0.1")
    assert rows["only_verdict"]["vamp2 best"] == rows["only_verdict"]["node-hours"] == ""


def test_cost_sums_over_starts_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    known = write_run(tmp_path / "known", starts=[{"seconds": HOUR, "nodes": 8}, {"seconds": HOUR / 2, "nodes": 4}])
    killed = write_run(tmp_path / "killed", starts=[{}, {"seconds": HOUR}])
    text = compare([known, killed], tmp_path)
    assert [float(row["node-hours"]) for row in rows_of(tmp_path)] == [10.0, 1.0]
    assert "killed: node-hours are a lower bound: 1 of 2 starts left no record of their end." in text
    assert "killed: the number of nodes was not recorded, and counts as 1." in text
    assert "known:" not in text


def test_start_without_its_seconds_counts_to_its_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", starts=[{"nodes": 2}])
    began = json.loads((run / "provenance.json").read_text())[0]["time"]
    ended = comparison._moment(began) + HOUR
    write_json(run / "status.json", {"state": "stopped", "time": clock(ended)})
    assert comparison.read_run(run, "run").node_hours == pytest.approx(2.0)


def test_real_run_is_read_as_its_summary_says(run_ranks, tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run")
    run_ranks(1, runs.run, config)
    run = comparison.read_run(Path(config.run_dir), "run")
    summary = runs.summary(config)
    assert run.objectives == ["vamp2", "vamp_sym"]
    assert {objective: run.best_score(objective) for objective in run.objectives} == summary["best"]
    assert run.last_score("vamp_sym") == summary["validation"]["vamp_sym"]
    assert (run.epochs, run.planned_epochs, run.steps, run.ranks) == (4, 4, 16, 1)
    assert run.test == summary["test"]


def test_ensemble_counts_the_runs_that_are_done(tmp_path: Path) -> None:
    done = [write_run(tmp_path / f"{seed}", [seed], seed=seed) for seed in (1, 3)]
    text = compare([*done, write_run(tmp_path / "9", [9.0], seed=9, state="failed")], tmp_path)
    assert [line.split()[3] for line in text.splitlines() if line.startswith("mean of 2")] == ["2"]
    assert text.endswith("Mean, standard deviation, min and max are over the runs that are done.")


def test_comparing_does_not_import_torch(tmp_path: Path) -> None:
    words = [str(write_run(tmp_path / "run")), "--output", str(tmp_path)]
    code = f"import sys, launch.compare as c; c.main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(comparison.__file__).parents[1]).returncode == 0


def test_folder_that_is_no_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "data").mkdir()
    with pytest.raises(MissingFile, match="data is not a run folder"):
        compare([run, tmp_path / "data"], tmp_path)
    assert main([str(run), str(tmp_path / "data"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match='no run has a validation score "vamp3"; known: loss, other, vamp2'):
        compare([run], tmp_path, "vamp3")


def test_program_prints_the_table_and_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    assert main([*map(str, runs), "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "done", "0"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("comparison.csv", "comparison.md", "comparison.png")
    ]
    markdown = (tmp_path / "new" / "comparison.md").read_text().splitlines()
    assert {line.count("|") for line in markdown} == {14}
