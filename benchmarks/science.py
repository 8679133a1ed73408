"""Train a run file once per seed and say what the test split says: every seed, then median, minimum and maximum.

    python -m benchmarks.science RUN_FILE [--seeds 0 1 2 3 4] [--parallel 2] [--output FOLDER] [-- OVERRIDES]

OVERRIDES are options of launch/train.py, as in `-- --optimization.learning_rate 1e-3`. Scores do not include the
constant singular function. Run folders, their logs and science.json go to FOLDER.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jsonargparse import ArgumentParser

from gdyn import config
from gdyn.engines.vamp.engine import Vamp
from gdyn.rundir import RunDir, read_json, write_json

TRAIN = Path(__file__).parent.parent / "launch" / "train.py"


def main() -> int:
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    parser = ArgumentParser(prog="python -m benchmarks.science", description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parallel", type=int, default=1, help="Runs at a time, of one thread each.")
    parser.add_argument("--output", type=Path, help="Default: runs/science/<folder>-<name> of the run file.")
    options = parser.parse_args(argv[:end])
    run_file: Path = options.run_file
    output = options.output or Path("runs") / "science" / f"{run_file.resolve().parent.name}-{run_file.stem}"
    output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        results = list(pool.map(lambda seed: train(run_file, seed, output, argv[end + 1 :]), options.seeds))
    columns = {name: [result[name] for result in results] for name in results[0]}
    print("".join(f"{name:>18}" for name in columns))
    for row in zip(*columns.values(), strict=True):
        print("".join(f"{value:>18.4f}" if isinstance(value, float) else f"{value:>18}" for value in row))
    for statistic in (statistics.median, min, max):
        values = [statistic(column) for name, column in columns.items() if name != "seed"]
        print(f"{statistic.__name__:>18}" + "".join(f"{value:>18.4f}" for value in values))
    write_json(output / "science.json", {"run_file": str(run_file), "overrides": argv[end + 1 :], "results": results})
    return 0


def train(run_file: Path, seed: int, output: Path, overrides: list[str]) -> dict[str, float]:
    """Raises: SystemExit with the run's log if it fails."""
    run_dir, log = RunDir(output / f"seed_{seed}"), output / f"seed_{seed}.log"
    options = ["--config", str(run_file), "--seed", str(seed), "--run_dir", str(run_dir.path), "--resume", "never"]
    began = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, str(TRAIN), *options, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        raise SystemExit(f"seed {seed} ended with exit code {code}:\n{log.read_text()[-2000:]}")
    test, engine = read_json(run_dir.summary_json)["test"], config.load(run_dir.run_yaml).engine
    assert isinstance(engine, Vamp)
    slowest = test["timescales"]["values"][0]  # None: does not decay
    return {
        "seed": seed,
        "test VAMP-2": test["vamp2"],
        "test VAMP-1": test["vamp1"],
        f"slowest [{engine.time_unit}]": float("inf") if slowest is None else slowest * engine.frame_time,
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    sys.exit(main())
