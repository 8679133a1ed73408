"""What a rank, and rank 0, must work out at start and at a checkpoint of 16,384 ranks, simulated on one core.

Each arm does the work of all ranks, one after the other: finding out who they are from the environment that srun gives
them, naming the job's nodes, describing every rank's file for the manifest of a checkpoint and writing it, reading the
manifest and comparing every file with it. A second arm does 1,024 ranks sixteen times, so 1 is linear. Messages between
ranks are not part of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Finding, finding, interleave, ratios
from gdyn import schedulers
from gdyn.checkpoints import MARK, CheckpointStore, _describe, _digest
from gdyn.launchers import discover
from gdyn.ranks import ALONE
from gdyn.rundir import write_json

SMALL, LARGE = 1024, 16384
PER_NODE = 8
CEILING = 1.5
"""Cost per rank at 16,384 ranks over that at 1,024; what is linear has 1, what is quadratic 16."""


def run(rounds: int) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        small, large = (_work(Path(folder) / str(world), world) for world in (SMALL, LARGE))
        arms: dict[str, Callable[[], object]] = {}
        for name in large:
            arms |= {f"large {name}": large[name], f"small {name}": partial(_repeat, small[name], LARGE // SMALL)}
        seconds = interleave(arms, rounds)
    findings = []
    for name in large:
        many, few = seconds[f"large {name}"], seconds[f"small {name}"]
        findings.append(finding(f"{name}, {LARGE:,} ranks", many, "CPU s"))
        findings.append(finding(f"... per rank, over {SMALL:,} ranks", ratios(many, few), "x", ceiling=CEILING))
    total = [sum(seconds[f"large {name}"][i] for name in large) for i in range(rounds)]
    return [*findings, finding(f"all of it, {LARGE:,} ranks", total, "CPU s")]


def _work(folder: Path, world: int) -> dict[str, Callable[[], object]]:
    """What is measured -> how to do it, with what it needs made beforehand."""
    environs = [srun_environment(rank, world) for rank in range(world)]
    nodes = world // PER_NODE
    job = {"SLURM_JOB_NODELIST": environs[0]["SLURM_STEP_NODELIST"]}
    assert len(schedulers.Slurm().node_names(job)) == nodes
    assert [discover(environ).rank for environ in environs] == list(range(world))
    files = [folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)]
    folder.mkdir()
    for path in files:
        path.write_bytes(path.name.encode())
    return {
        "who am I": lambda: [discover(environ) for environ in environs],
        "names of the nodes, 16 x": partial(_repeat, lambda: schedulers.Slurm().node_names(job), 16),
        "write the manifest": lambda: write_manifest(folder, files),
        "read and compare": lambda: compare_with_manifest(folder),
    }


def srun_environment(rank: int, world: int) -> dict[str, str]:
    """As srun sets it on Frontier, on nodes of which every eighth was not free."""
    nodes = world // PER_NODE
    ranges = ",".join(f"{8 * i + 1:05d}-{8 * i + 7:05d}" for i in range(nodes // 7))
    rest = f",{8 * (nodes // 7) + 1:05d}-{8 * (nodes // 7) + nodes % 7:05d}" if nodes % 7 else ""
    return {
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % PER_NODE),
        "SLURM_NODEID": str(rank // PER_NODE),
        "SLURM_NTASKS": str(world),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{PER_NODE}(x{nodes})",
        "SLURM_STEP_NODELIST": f"frontier[{ranges}{rest}]",
    }


def write_manifest(folder: Path, files: list[Path]) -> None:
    """What the ranks of `CheckpointStore.save` do once DeepSpeed has written, but for waiting for the disk."""
    record: dict[str, Any] = {"position": {}, "world_size": len(files), "written": 0.0}
    record["files"] = {path.name: _describe(path) for path in files}
    write_json(folder / MARK, record | {"sha256": _digest(record)})


def compare_with_manifest(folder: Path) -> None:
    damage = CheckpointStore(folder.parent, ALONE).damage(CheckpointStore.read(folder))
    assert not damage


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()
