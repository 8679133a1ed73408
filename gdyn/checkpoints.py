"""CheckpointStore: DeepSpeed checkpoints that are whole or do not count.

    checkpoints/<tag>/...               what DeepSpeed writes, one part per rank
    checkpoints/<tag>/weights.safetensors   all weights in fp32, readable by anything, by any number of ranks
    checkpoints/<tag>/position.json     written last: the next work, the best so far, size and digest of every file
    checkpoints/latest                  the newest whole tag; moved after position.json
    checkpoints/best.json               per objective: tag and validation score; copied from the newest position.json

A tag without position.json is a save that was interrupted, and is ignored. DeepSpeed's own `latest` is not used: it can
name a tag whose parts do not exist yet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from gdyn.errors import MissingFile, UserError
from gdyn.phases import Phase, Plan, Position
from gdyn.rundir import read_json, write_json, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from gdyn.ranks import RankContext

log = logging.getLogger("gdyn")

MARK = "position.json"
WEIGHTS = "weights.safetensors"
_BROKEN = re.compile(r"\.broken\d*$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, as its position.json describes it."""

    path: Path
    position: Position
    record: dict[str, Any]

    @property
    def tag(self) -> str:
        return self.path.name

    @property
    def world_size(self) -> int:
        return int(self.record["world_size"])

    @property
    def zero_stage(self) -> int:
        return int(self.record["zero_stage"])

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / WEIGHTS)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. `here` is whose share of the work this process does."""

    path: Path
    here: RankContext
    keep: int = 2
    """How many of the newest are kept beside the best, the latest and the end of each phase."""
    save_best_only: bool = False
    """Keep only the best and the latest."""

    def save(self, ds: DeepSpeedEngine, plan: Plan, position: Position, facts: dict[str, Any]) -> str:
        """Save on all ranks; returns the tag. Every rank must call this. `facts` go into position.json; its "best" is
        what `best` returns from now on."""
        tag = plan.tag(position)
        folder = self.path / tag
        if self.here.main:
            # An interrupted save of the same position, or what was before the run went back to an older tag.
            _remove(folder)
            shutil.rmtree(_universal(folder), ignore_errors=True)
        self.here.barrier()
        # The version entry lets DeepSpeed's converter reshape the checkpoint for another number of ranks.
        universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        ds.save_checkpoint(str(self.path), tag=tag, client_state=universal, save_latest=False)
        weights = full_weights(ds)
        if self.here.main:
            save_file(weights, folder / WEIGHTS)
        self.here.barrier()
        # Listed once, because thousands of ranks that list thousands of files bring a file system down.
        files = self.here.broadcast(sorted(_files(folder)) if self.here.main else None)
        mine = {name: _describe(folder / name, sync=True) for name in files[self.here.rank :: self.here.world_size]}
        parts = self.here.collect(mine)
        if parts is not None:
            described = {name: facts for part in parts for name, facts in part.items()}
            record = {
                "position": asdict(position),
                "written": time.time(),
                "phases": [asdict(phase) for phase in plan.phases],
                "world_size": self.here.world_size,
                "zero_stage": ds.zero_optimization_stage(),
                **facts,
                "files": described,
            }
            write_json(folder / MARK, record | {"sha256": _digest(record)})
            write_text(self.path / "latest", tag + "\n")
            write_json(self.path / "best.json", facts["best"])
        self.here.barrier()
        return tag

    def whole(self) -> list[Checkpoint]:
        """Every checkpoint that was finished and whose position.json is readable, newest first."""
        found, _ = self._look()
        # By time, because a run that went back to an older tag goes on from there, whatever it had reached before.
        return sorted(found, key=lambda checkpoint: (checkpoint.record["written"], checkpoint.position), reverse=True)

    def _look(self) -> tuple[list[Checkpoint], list[str]]:
        """(finished checkpoints, what is wrong with those whose position.json cannot be understood)."""
        found, problems = [], []
        for mark in sorted(self.path.glob(f"*/{MARK}")):
            if not _BROKEN.search(mark.parent.name):
                try:
                    found.append(self.read(mark.parent))
                except UserError as error:
                    problems.append(str(error))
        return found, problems

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """Raises: MissingFile if `folder` is no whole checkpoint, UserError if it is damaged or another program's."""
        if not (folder / MARK).is_file():
            raise MissingFile(
                f"{folder} is not a whole checkpoint of this program (no {MARK}); give a tag from the run's "
                "checkpoints folder."
            )
        record = read_json(folder / MARK)
        try:
            checksum = record.pop("sha256")
            checkpoint = Checkpoint(folder, Position(**record["position"]), record)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MARK} was not written by this program ({error}).") from None
        if checksum != _digest(record):
            raise UserError(f"{folder / MARK} has changed (its checksum differs).")
        return checkpoint

    def find(self, which: str) -> Checkpoint | None:
        """The checkpoint to resume from: `auto` (the newest intact one, with a warning for every damaged one; None if
        the run has no history), `never` (None), or a tag. Every rank must call this, and all get the same answer.

        Raises: UserError if the run has history and no intact checkpoint: nothing restarts from scratch unasked.
        """
        if which == "never":
            if self._has_history():
                raise UserError(
                    f"--resume never, but {self.path} already holds checkpoints; give another --run_dir or remove the "
                    "folder."
                )
            return None
        if which != "auto":
            folder = Path(which) if Path(which).is_dir() else self.path / which
            checkpoint = self.read(folder)
            damage = self.damage(checkpoint)
            if damage:
                raise UserError(f"{folder} is damaged: {damage}; resume from another tag or with --resume auto.")
            return checkpoint
        for checkpoint in self._candidates():
            damage = self.damage(checkpoint)
            if not damage:
                return checkpoint
            log.warning("checkpoint %s is damaged (%s); falling back to the one before it.", checkpoint.tag, damage)
            if self.here.main:
                checkpoint.path.rename(_set_aside(checkpoint.path))
            self.here.barrier()
        if self._has_history():
            raise UserError(
                f"every checkpoint in {self.path} is damaged (now named *.broken, or without a readable {MARK}); "
                "restore one, or "
                "start over in another --run_dir."
            )
        return None

    def _candidates(self) -> Iterator[Checkpoint]:
        """Every checkpoint that was finished, newest first. Every rank must iterate. Rank 0 alone looks, because each
        position.json lists thousands of files where there are thousands of ranks."""
        found = iter(self.whole() if self.here.main else ())
        if self.here.main:
            for problem in self._look()[1]:
                log.warning("%s; it is ignored.", problem)
        while (checkpoint := self.here.broadcast(next(found, None))) is not None:
            yield checkpoint

    def _has_history(self) -> bool:
        return any(self.path.glob(f"*/{MARK}"))

    def damage(self, checkpoint: Checkpoint) -> str:
        """What is wrong with a checkpoint's files, empty if nothing is. Every rank must call this; the ranks share the
        reading and agree on the answer."""
        files: dict[str, dict[str, Any]] = checkpoint.record["files"]
        names = sorted(files)[self.here.rank :: self.here.world_size]
        found = [problem for name in names if (problem := _compare(checkpoint.path / name, files[name]))]
        if not self.here.any(bool(found)):
            return ""
        return "; ".join(problem for part in self.here.gather(found) for problem in part)

    def load(self, ds: DeepSpeedEngine, checkpoint: Checkpoint, tag: str) -> None:
        """Weights, optimizer and schedule into `ds`. Every rank must call this. `tag` is what `reshape` returned."""
        loaded, _ = ds.load_checkpoint(str(checkpoint.path.parent), tag=tag)
        if loaded is None:
            raise UserError(f"DeepSpeed found nothing to load in {checkpoint.path.parent / tag}.")
        if ds.zero_optimization_stage() == 3:
            # Loading leaves small parameters gathered. But that a module uses another one's parameter, as fused layers
            # do, DeepSpeed only notices where it finds that sharded, in the first forward pass; else it fails later
            # ("tracing error").
            for parameter in ds.module.parameters():
                parameter.partition()

    def reshape(self, checkpoint: Checkpoint, zero_stage: int, optimizer: str | None = None) -> tuple[str, bool]:
        """(tag to load, whether it is DeepSpeed's universal format). Sharded optimizer states of another number of
        ranks are converted once, by rank 0. Every rank must call this.

        Raises: UserError if the ZeRO stage changed, which no format supports, or for Muon on another number of ranks.
        """
        if checkpoint.zero_stage != zero_stage:
            raise UserError(
                f"checkpoint {checkpoint.tag} was written with ZeRO stage {checkpoint.zero_stage}, the DeepSpeed JSON "
                "now says "
                f"{zero_stage}; keep the stage, or start a new run with --init_from {checkpoint.path.parent.parent}."
            )
        if checkpoint.world_size == self.here.world_size or zero_stage == 0:
            return checkpoint.tag, False
        if optimizer == "Muon":
            raise UserError(
                f"checkpoint {checkpoint.tag} was written by {checkpoint.world_size} ranks, and there are now "
                f"{self.here.world_size}; DeepSpeed cannot reshape Muon's state at ZeRO stage {zero_stage}. Resume on "
                f"{checkpoint.world_size} ranks, or start a new run with --init_from {checkpoint.path.parent.parent} "
                "(ZeRO stage 0 can change)."
            )
        universal = _universal(checkpoint.path)
        log.info("converting %s from %d to %d ranks.", checkpoint.tag, checkpoint.world_size, self.here.world_size)
        with self.here.together():
            if self.here.main and not universal.exists():
                _convert(checkpoint.path, universal)
        return universal.name, True

    def best(self) -> dict[str, dict[str, Any]]:
        """Per objective: tag, score, and the epoch over the whole run. Only what is still there."""
        path = self.path / "best.json"
        best: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        return {objective: entry for objective, entry in best.items() if (self.path / entry["tag"] / MARK).is_file()}

    def recall_best(self, checkpoint: Checkpoint) -> None:
        """Make `best` what it was when `checkpoint` was written, whatever was interrupted since. Every rank must call
        this."""
        if self.here.main:
            write_json(self.path / "best.json", checkpoint.record["best"])
        self.here.barrier()

    def prune(self) -> None:
        """Remove what no rule keeps. Rank 0 calls this."""
        checkpoints = self.whole()
        kept = {checkpoint.tag for checkpoint in checkpoints[:1]} | {entry["tag"] for entry in self.best().values()}
        if not self.save_best_only:
            kept |= {checkpoint.tag for checkpoint in checkpoints[: self.keep]}
            # Epoch 0 of phase p is next: the end of the phase before.
            kept |= {c.tag for c in checkpoints if c.position.epoch == 0 and c.position.sample == 0}
        # What a phase restores at its end, by whatever checkpoint the run is resumed.
        kept |= {c.record["phase_best"]["tag"] for c in checkpoints if c.tag in kept and c.record.get("phase_best")}
        for checkpoint in checkpoints:
            if checkpoint.tag not in kept:
                _remove(checkpoint.path)
        for leftover in self.path.glob("*.universal*"):
            shutil.rmtree(leftover)


def full_weights(ds: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All weights and buffers, unsharded, floating-point ones in fp32 (the optimizer's master copy) or as fp64 buffers,
    on the CPU. Every rank must call this."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param  # slow to import

    module = ds.module
    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=ds.zero_optimization_stage() == 3):
        weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    for name, parameter in parameters.items():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is not None:
            weights[name] = master.detach().cpu().clone().view_as(weights[name])
    half = (torch.bfloat16, torch.float16)
    return {name: (w.float() if w.dtype in half else w).contiguous() for name, w in weights.items()}


def phases_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The schedule a checkpoint was trained under, as dictionaries of `Phase` fields."""
    return [asdict(Phase(**phase)) | {"trains": list(phase["trains"])} for phase in checkpoint.record["phases"]]


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _remove(folder: Path) -> None:
    """The mark first, so that a removal that is interrupted leaves no checkpoint that looks whole."""
    if folder.exists():
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _universal(folder: Path) -> Path:
    """Where the conversion of a checkpoint for other numbers of ranks lies."""
    return folder.with_name(folder.name + ".universal")


def _set_aside(folder: Path) -> Path:
    """A name for a damaged checkpoint under which it is no candidate any more: <tag>.broken, then <tag>.broken2 ..."""
    names = (folder.with_name(f"{folder.name}.broken{i if i > 1 else ''}") for i in itertools.count(1))
    return next(path for path in names if not path.exists())


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _describe(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _compare(path: Path, expected: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
    return "" if _describe(path) == expected else f"{path.name} has changed (its checksum differs)"


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's offline converter, in a process of its own, into a folder that is renamed when it is whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(partial)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{source} cannot be converted for another number of ranks: {done.stderr.strip().splitlines()[-1:]}"
        )
    partial.rename(target)
    (source.parent / "latest_universal").unlink(missing_ok=True)
