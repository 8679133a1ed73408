"""Runs side by side: scores, what differs, throughput, cost. Reads files only and needs no torch, so a login node can.

Running, failed and stopped runs compare as well as finished ones, and runs of different engines on what they share.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from gdyn.errors import UserError
from gdyn.rundir import RunDir, read_json, read_metrics, write_text

SILENT = 600.0
"""Seconds without a sign of life after which a run without a verdict is not called running any more."""
OWN = {"run_dir", "wandb.run_name"}
"""Keys whose values are a run's own name, and no difference between experiments."""
LEGIBLE = 12
"""Lines that a legend can name."""

Columns = dict[str, list[Any]]
"""Header -> one value per run; None: the run has none."""


@dataclass(frozen=True)
class Run:
    """What the files of one run say."""

    name: str
    """Its path below what all compared runs have in common."""
    path: Path
    state: str
    """done, failed, user_error, stopped (the last start's verdict), running, silent, not started, or unknown."""
    config: Mapping[str, Any]
    """Run file and DeepSpeed JSON as used, flat, as the command line writes keys; those of the JSON start with `ds.`"""
    best: Mapping[str, Mapping[str, Any]]
    """Per objective: score, and the epoch over the whole run, from 1."""
    validation: Sequence[Mapping[str, Any]]
    """Its lines of metrics.jsonl, one per epoch."""
    test: Mapping[str, Any]
    epochs: int
    planned_epochs: int | None
    steps: int
    samples_per_second: float | None
    """Median over the train lines."""
    ranks: int | None
    nodes: int | None
    node_hours: float | None
    """Over all starts."""
    commit: str
    remarks: tuple[str, ...]
    """What to know about its numbers."""

    @property
    def objectives(self) -> list[str]:
        """In the order of the phases."""
        listed = [value for key, value in self.config.items() if key.endswith("].objective")]
        return list(dict.fromkeys([*listed, *(self.config.get("loss_schedule") or ()), *self.best]))

    def best_score(self, metric: str) -> float | None:
        """On validation. Of a metric that is no objective: its value at the best epoch of the last objective."""
        if metric in self.best:
            return _number(self.best[metric]["score"])
        epochs = [self.best[objective]["epoch"] - 1 for objective in self.objectives if objective in self.best]
        return next((_number(row.get(metric)) for row in self.validation if row["epoch"] in epochs[-1:]), None)

    def last_score(self, metric: str) -> float | None:
        return next((_number(row[metric]) for row in reversed(self.validation) if metric in row), None)


def compare(run_dirs: Sequence[Path], output: Path, metric: str | None = None) -> str:
    """The table as text, with remarks; also writes comparison.csv (one line per run), .md and .png into `output`.

    metric: a key of the validation scores, instead of the objectives.

    Raises: MissingFile for a folder that is no run, UserError for a metric that no run has or files that are damaged.
    """
    paths = list(dict.fromkeys(Path(path).absolute() for path in run_dirs))
    if not paths:
        raise UserError("no run to compare; give the --run_dir of one or more training runs.")
    above = os.path.commonpath([path.parent for path in paths])
    runs = [read_run(path, os.path.relpath(path, above)) for path in paths]
    metrics = _metrics(runs, metric)
    differences = config_differences(runs)
    columns = table(runs, differences, metrics)
    ensembles = ensemble_statistics(columns, differences)
    remarks = _remarks(runs)
    if ensembles and any(run.state != "done" for run in runs):
        remarks.append("Mean, standard deviation, min and max are over the runs that are done.")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.csv", _csv(columns))
    write_text(output / "comparison.md", _markdown(columns, ensembles, remarks))
    # What most runs have; of equals the last phase's.
    drawn = max(reversed(metrics), key=lambda name: sum(run.last_score(name) is not None for run in runs))
    picture(runs, differences, drawn, output / "comparison.png")
    return "\n".join([_text(columns, ensembles), *remarks])


# Reading


def read_run(path: Path, name: str) -> Run:
    """Raises: MissingFile if there is no run, UserError for files that are damaged."""
    run_dir = RunDir(path)
    if not run_dir.status_json.is_file():  # a run that failed before it wrote its run.yaml has a verdict only
        run_dir.existing()
    starts = _json(run_dir.provenance_json, [])
    summary = _json(run_dir.summary_json, {})
    lines = read_metrics(run_dir.metrics_jsonl)
    validation = [line for line in lines if line["split"] == "validation"]
    rates = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    config = dict(_config(run_dir))
    node_hours, remarks = _cost(run_dir, starts)
    last = starts[-1] if starts else {}
    best = _json(run_dir.checkpoints / "best.json", {})
    return Run(
        name=name,
        path=path,
        state=_state(run_dir, starts, time.time()),
        config=config,
        best=best or {objective: {"score": score, "epoch": 0} for objective, score in summary.get("best", {}).items()},
        validation=validation,
        test=summary.get("test", {}),
        epochs=max((line["epoch"] + 1 for line in validation), default=0),
        planned_epochs=_planned_epochs(config),
        steps=max((line["step"] for line in lines), default=0),
        samples_per_second=statistics.median(rates) if rates else None,
        ranks=last.get("world_size", summary.get("world_size")),
        nodes=last.get("nodes"),
        node_hours=node_hours,
        commit=last.get("git_commit", ""),
        remarks=tuple(remarks),
    )


def _json(path: Path, default: Any) -> Any:
    return read_json(path) if path.exists() else default


def _config(run_dir: RunDir) -> Iterator[tuple[str, Any]]:
    if run_dir.run_yaml.exists():
        try:
            values = yaml.safe_load(run_dir.run_yaml.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{run_dir.run_yaml} is not YAML ({' '.join(str(error).split())}).") from None
        for key, value in flat(values):
            yield key.replace(".init_args.", ".").removesuffix(".class_path"), value
    if run_dir.deepspeed_json.exists():
        yield from flat(read_json(run_dir.deepspeed_json), "ds")


def flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b[0].c`, value) of everything in it; a list of plain values is one value."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for i, value in enumerate(values):
            yield from flat(value, f"{key}[{i}]")
    else:
        yield key, values


def _planned_epochs(config: Mapping[str, Any]) -> int | None:
    phases = [value for key, value in config.items() if key.startswith("phases[") and key.endswith("].epochs")]
    if phases:
        return sum(phases)
    return len(config["loss_schedule"]) * config["epochs"] if config.get("loss_schedule") else None


def _state(run_dir: RunDir, starts: Sequence[Mapping[str, Any]], now: float) -> str:
    """A verdict that is older than the last start is not about it."""
    if not starts:
        unheard = "unknown" if run_dir.metrics_jsonl.exists() else "not started"
        return str(_json(run_dir.status_json, {}).get("state", unheard))
    began = _moment(starts[-1]["time"])
    if _verdict(run_dir, began) is not None:
        return str(read_json(run_dir.status_json)["state"])
    return "running" if now - (_sign_of_life(run_dir, began) or began) < SILENT else "silent"


def _cost(run_dir: RunDir, starts: Sequence[Mapping[str, Any]]) -> tuple[float | None, list[str]]:
    """(node-hours of all starts, remarks on them). What ended without a record counts up to its last sign of life if it
    is the last start, and not at all if it is not."""
    total, unknown = 0.0, 0
    for start in starts:
        seconds = start.get("seconds")
        if seconds is None and start is starts[-1]:
            began = _moment(start["time"])
            ended = _verdict(run_dir, began) or _sign_of_life(run_dir, began)
            seconds = ended - began if ended else None
        unknown += seconds is None
        total += start.get("nodes", 1) * (seconds or 0.0) / 3600
    remarks = []
    if unknown:
        remarks.append(f"node-hours are a lower bound: {unknown} of {len(starts)} starts left no record of their end")
    if any("nodes" not in start for start in starts):
        remarks.append("the number of nodes was not recorded, and counts as 1")
    return total if len(starts) > unknown else None, remarks


def _verdict(run_dir: RunDir, began: float) -> float | None:
    """When the start that began then ended, by status.json."""
    text = _json(run_dir.status_json, {}).get("time")
    return _moment(text) if text and _moment(text) >= began else None


def _sign_of_life(run_dir: RunDir, began: float) -> float | None:
    """The last one of the start that began then: its heartbeat, else a line of metrics."""
    beat = _json(run_dir.heartbeat_json, {}).get("time", 0.0)
    if beat >= began:
        return float(beat)
    changed = run_dir.metrics_jsonl.stat().st_mtime if run_dir.metrics_jsonl.exists() else 0.0
    return changed if changed >= began else None


def _moment(text: str) -> float:
    """ISO time with offset -> seconds since the epoch."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()


# Comparing


def config_differences(runs: Sequence[Run]) -> Columns:
    """Keys whose values differ, with the value of every run (None: unset). What only one of the engines knows is left
    out; and a key of the DeepSpeed JSON that only repeats one of the run file; and the JSON's path where its
    content is known."""
    known = [run.config for run in runs if run.config]
    ignored = set(OWN)
    if all(any(key.startswith("ds.") for key in config) for config in known):
        ignored.add("deepspeed")
    else:  # a run that has not written its JSON yet does not differ in all of it
        ignored |= {key for config in known for key in config if key.startswith("ds.")}
    if len({config.get("engine") for config in known}) > 1:
        ignored |= {key for config in known for key in config if not all(key in other for other in known)}
    keys = [key for config in known for key in config]
    found: Columns = {}
    for key in dict.fromkeys(keys):
        values = [run.config.get(key) for run in runs]
        if key in ignored or all(config.get(key) == known[0].get(key) for config in known):
            continue
        if not (key.startswith("ds.") and values in found.values()):
            found[key] = values
    return found


def table(runs: Sequence[Run], differences: Columns, metrics: Sequence[str]) -> Columns:
    """One row per run; scores are of validation but for `test`."""
    columns: Columns = {"run": [run.name for run in runs], "state": [run.state for run in runs], **differences}
    for metric in metrics:
        columns[f"{metric} best"] = [run.best_score(metric) for run in runs]
        columns[f"{metric} last"] = [run.last_score(metric) for run in runs]
        columns[f"{metric} test"] = [_number(run.test.get(metric)) for run in runs]
    columns |= {
        "epochs done": [run.epochs for run in runs],
        "planned": [run.planned_epochs for run in runs],
        "steps": [run.steps for run in runs],
        "samples/s": [run.samples_per_second for run in runs],
        "ranks": [run.ranks for run in runs],
        "nodes": [run.nodes for run in runs],
        "node-hours": [run.node_hours for run in runs],
    }
    return {header: values for header, values in columns.items() if any(value is not None for value in values)}


def ensemble_statistics(columns: Columns, differences: Columns) -> list[dict[str, Any]]:
    """Rows of mean, standard deviation (n - 1), min and max, for every group of runs that differ in their seed only;
    over the runs that are done, if there are two."""
    if "seed" not in differences:
        return []
    others = [key for key in differences if key != "seed"]
    groups: dict[str, list[int]] = {}
    for i, state in enumerate(columns["state"]):
        if state == "done":
            groups.setdefault(str([differences[key][i] for key in others]), []).append(i)
    numbers = [header for header in columns if header.endswith((" best", " last", " test", "samples/s", "node-hours"))]
    rows = []
    for group in groups.values():
        if len(group) < 2:
            continue
        shared = {key: differences[key][group[0]] for key in others}
        for name, statistic in (
            ("mean", statistics.fmean),
            ("standard deviation", statistics.stdev),
            ("min", min),
            ("max", max),
        ):
            found = {
                header: [columns[header][i] for i in group if columns[header][i] is not None] for header in numbers
            }
            values = {header: statistic(numbers) for header, numbers in found.items() if len(numbers) > 1}
            rows.append({"run": f"{name} of {len(group)}", **shared, **values})
    return rows


def _metrics(runs: Sequence[Run], metric: str | None) -> list[str]:
    """Which scores to show. Raises: UserError if no run has `metric`."""
    if metric is None:
        return list(dict.fromkeys(objective for run in runs for objective in run.objectives)) or ["loss"]
    known = {key for run in runs for row in run.validation for key in row if _number(row[key]) is not None}
    if metric not in known:
        scores = ", ".join(sorted(known - {"step", "epoch"})) or "none yet"
        raise UserError(f'no run has a validation score "{metric}"; known: {scores}.')
    return [metric]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _remarks(runs: Sequence[Run]) -> list[str]:
    remarks: dict[str, list[str]] = {}
    for run in runs:
        for remark in run.remarks:
            remarks.setdefault(remark, []).append(run.name)
    lines = [
        f"{', '.join(names) if len(names) < len(runs) else 'all runs'}: {text}." for text, names in remarks.items()
    ]
    if len({run.commit for run in runs if run.commit}) > 1:
        lines.append("The runs are of different commits of gdyn; see provenance.json.")
    return lines


# Showing


def _csv(columns: Columns) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return buffer.getvalue()


def _cells(columns: Columns, ensembles: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """(rows of runs, rows of ensembles), as a person reads them."""
    runs = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
    blank = dict.fromkeys(columns, "")
    return runs, [[_cell(value) for value in (blank | dict(row)).values()] for row in ensembles]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(columns: Columns, ensembles: Sequence[Mapping[str, Any]]) -> str:
    rows, statistic = _cells(columns, ensembles)
    last_words = [header.rpartition(".")[2] for header in columns]
    head = [word if last_words.count(word) == 1 else header for word, header in zip(last_words, columns, strict=True)]
    widths = [max(map(len, column)) for column in zip(head, *rows, *statistic, strict=True)]

    def line(row: Sequence[str]) -> str:
        rest = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([f"{row[0]:<{widths[0]}}", *rest]).rstrip()

    rule = ["-" * (sum(widths) + 2 * len(widths) - 2)]
    return "\n".join([line(head), *map(line, rows), *(rule if statistic else []), *map(line, statistic)])


def _markdown(columns: Columns, ensembles: Sequence[Mapping[str, Any]], remarks: Sequence[str]) -> str:
    rows, statistic = _cells(columns, ensembles)
    lines = [list(columns), ["---"] * len(columns), *rows, *statistic]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join([text, *(f"\n{remark}" for remark in remarks)]) + "\n"


def picture(runs: Sequence[Run], differences: Columns, metric: str, path: Path) -> None:
    """The validation score over epochs, and the best against what the run cost. Writes a PNG."""
    import matplotlib  # a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from gdyn import report

    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(11, 4.4))
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for i, run in enumerate(runs):
            points = [(row["epoch"] + 1, row[metric]) for row in run.validation if _number(row.get(metric)) is not None]
            tint, best = report.colour(i), run.best_score(metric)
            if points:
                left.plot(
                    *zip(*points, strict=True),
                    color=tint,
                    marker="o",
                    markersize=3.5,
                    label=_label(i, run, differences),
                )
            if best is not None and run.node_hours is not None:
                face = tint if run.state == "done" else "none"
                right.scatter(run.node_hours, best, s=60, facecolor=face, edgecolor=tint, linewidth=1.8)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(xlabel="epoch", ylabel=f"validation {metric}", title="validation score")
        right.set(
            xlabel="node-hours", ylabel=f"best validation {metric}", title="best score and cost (hollow: not done)"
        )
        if 0 < len(left.lines) <= LEGIBLE:
            left.legend()
        report.save_png(figure, path)


def _label(i: int, run: Run, differences: Columns) -> str:
    """What differs, if that is short; else the run's name."""
    words = [f"{key.rpartition('.')[2]} {_cell(values[i])}" for key, values in differences.items()]
    text = ", ".join(words)
    return text if 0 < len(text) <= 40 else run.name
