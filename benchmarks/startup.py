"""From the start of the process to the first step: which files importing opens, and where the seconds go.

Thousands of ranks that import from one file system open these files all at once, so their number is what staging an
environment on the nodes saves. The named alternative opens what no training on DeepSpeed can do without: torch and
deepspeed. The seconds are those that a real run on 2 ranks writes to its provenance.json; wall time, without a claim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Finding, Rounds, finding, ratios
from benchmarks.workload import BATCH, SMALL, engine, write_trajectory
from gdyn import recipes
from gdyn.config import Logging, Optimization, RunConfig
from gdyn.phases import Phase
from gdyn.rundir import RunDir, read_json

ROOT = Path(__file__).resolve().parents[1]
CEILING = 1.25
ALTERNATIVE = ("torch", "deepspeed")
TRAINING = (
    *("launch.train", "gdyn.config", "gdyn.ds_config", "gdyn.ds_machine", "gdyn.signals", "gdyn.trainer"),
    "deepspeed",
)
"""What launch/train.py imports, some of it inside functions."""
RANK_0 = (*TRAINING, "torch.utils.tensorboard")
RANKS = 2
PARTS = {
    "import": "imports",
    "rendezvous": "ranks meet",
    "data": "data opened and checked",
    "initialize": "DeepSpeed initialised, what is compiled",
    "first_window": "first window",
}
"""Keys of "startup" in provenance.json."""

# An import opens .py and .pyc files by `open`, which the hook sees, and libraries by the loader, which it does not.
CHILD = """
import sys
opened = set()
sys.addaudithook(lambda event, words: event == "open" and isinstance(words[0], str) and opened.add(words[0]))
import importlib, json, time
before = time.process_time()
for name in sys.argv[1:]:
    importlib.import_module(name)
seconds = time.process_time() - before
with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if ".so" in line}
print(json.dumps({"opened": sorted(opened), "libraries": sorted(libraries), "seconds": seconds}))
"""


def run(rounds: int) -> list[Finding]:
    arms = {"ours": TRAINING, "alternative": ALTERNATIVE, "rank 0": RANK_0}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(rounds + 1):  # the first compiles what was edited
        for name, modules in arms.items():
            found[name].append(imported(modules))
    files = {name: [float(len(files_of(one))) for one in every[1:]] for name, every in found.items()}
    seconds = {name: [one["seconds"] for one in every[1:]] for name, every in found.items()}
    print("\nFiles opened by importing what training needs:")
    for place, paths in places(files_of(found["ours"][-1])).items():
        print(f"{len(paths):>6}  {place}" + (f": {' '.join(sorted(paths))}" if place == ELSEWHERE else ""))
    ours, alternative = files["ours"], files["alternative"]
    return [
        finding("imports of training", ours, "files opened"),
        finding("with rank 0's TensorBoard writer", files["rank 0"], "files opened"),
        finding("import torch; import deepspeed", alternative, "files opened"),
        finding("training / torch and deepspeed", ratios(ours, alternative), "x files", ceiling=CEILING),
        finding("the same", ratios(seconds["ours"], seconds["alternative"]), "x CPU time"),
        *started(rounds),
    ]


def imported(modules: tuple[str, ...]) -> dict[str, Any]:
    """What a fresh interpreter opens and takes to import `modules`."""
    command = [sys.executable, "-c", CHILD, *modules]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def files_of(found: dict[str, Any]) -> set[str]:
    """Without the names of import hooks, and what was looked for in vain."""
    return {
        path for path in [*found["opened"], *found["libraries"]] if Path(path).is_absolute() and Path(path).exists()
    }


ELSEWHERE = "elsewhere"


def places(files: set[str]) -> dict[str, list[str]]:
    """The files by where they lie: what staging the environment's folder alone would leave behind comes after it."""
    folders = {
        sys.prefix: f"in the environment {sys.prefix}",
        str(ROOT): "of gdyn",
        sysconfig.get_path("stdlib"): "of the interpreter's standard library, outside the environment",
        "/usr/lib": "of the system's libraries",
        "/proc": "of /proc and /sys, which are no files",
        "/sys": "of /proc and /sys, which are no files",
    }
    found: dict[str, list[str]] = {place: [] for place in [*folders.values(), ELSEWHERE]}
    for path in files:
        home = next((folder for folder in folders if path.startswith(f"{folder}/")), None)
        found[folders[home] if home else ELSEWHERE].append(path)
    return {place: paths for place, paths in found.items() if paths}


def started(rounds: int) -> list[Finding]:
    """Wall seconds of each part of the start of a real run."""
    seconds: dict[str, Rounds] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        data = write_trajectory(Path(folder) / "data", 4 * BATCH + 10, SMALL)
        for i in range(rounds):
            run_dir = train(data, Path(folder) / f"run{i}")
            for name, value in startup_of(run_dir).items():
                seconds[name].append(value)
    if not all(seconds.values()):
        print("provenance.json does not say how long the start took; its parts are left out.")
        return []
    total = [sum(values) for values in zip(*seconds.values(), strict=True)]
    return [
        *(finding(f"start on {RANKS} ranks: {PARTS[name]}", values, "s") for name, values in seconds.items()),
        finding("process start to end of first step", total, "s"),
    ]


def startup_of(run_dir: RunDir) -> dict[str, float]:
    """The parts of the last start; empty if it was not measured."""
    startup = read_json(run_dir.provenance_json)[-1].get("startup", {})
    return {name: float(startup[name]) for name in PARTS if name in startup}


def train(data: Path, folder: Path) -> RunDir:
    """Train one epoch of a few steps by launch/train.py, on two ranks."""
    config = RunConfig(
        engine=engine(data),
        deepspeed=str(recipes.find_recipe("fp32_zero1", None)),
        run_dir=str(folder),
        phases=[Phase("vamp2", 1)],
        optimization=Optimization(batch_size=BATCH // RANKS, gradient_accumulation_steps=1, learning_rate=1e-4),
        logging=Logging(progress="off"),
    )
    run_file = folder.with_suffix(".yaml")
    run_file.write_text(config.to_yaml())
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(run_file)]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000), "WORLD_SIZE": str(RANKS)}
    meet |= {"LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    cores = set(range(os.cpu_count() or 1))
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # the measuring process has itself pinned to one
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(errors)[-2000:])
    return RunDir(folder)
