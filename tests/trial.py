"""A small run that works, to be spoilt in one place."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from gdyn import recipes


@dataclass
class Trial:
    """A small run that works, to be spoilt in one place."""

    folder: Path
    argv: list[str] = field(default_factory=list)
    environ: dict[str, str | None] = field(default_factory=dict)
    """None: unset."""
    program: str = "train"
    checked_bytes: int | None = None
    """How much of a trajectory is looked at before training; None: as the program does."""
    apart: bool = False
    """Rank 1 starts in a folder of its own, where relative paths lead to nothing."""

    def __post_init__(self) -> None:
        self.json = json.loads(recipes.bundled()["fp32_zero0"].read_text()) | {"train_micro_batch_size_per_gpu": 10}
        self.vamp = {"train": [str(self.train)], "validation": [str(self.folder / "validation")]}
        self.vamp |= {"tau": 2, "state_len": 2, "atom_fea_len": 4, "n_conv": 1, "num_gaussians": 4}
        self.run = {
            "engine": {"class_path": "Vamp", "init_args": self.vamp},
            "deepspeed": str(self.folder / "ds.json"),
            "run_dir": str(self.run_dir),
            "loss_schedule": ["vamp2"],
            "epochs": 1,
            "optimization": {"learning_rate": 0.01},
        }
        self.config = self.folder / "run.yaml"
        self.run_file: str | bytes | None = None

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoint(self) -> Path:
        """The newest of the trained run."""
        return self.run_dir / "checkpoints" / (self.run_dir / "checkpoints/latest").read_text().strip()

    def write(self) -> list[str]:
        """The files; returns the command line."""
        (self.folder / "ds.json").write_text(json.dumps(self.json))
        content = yaml.safe_dump(self.run) if self.run_file is None else self.run_file
        for path in (self.folder / "run.yaml", self.folder / "runs" / "run.yaml"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(self.config), *self.argv] if self.program == "train" else self.argv

    def save(self, name: str, array: Any) -> None:
        np.save(self.train / f"{name}.npy", array)

    def change(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.save(name, change(np.load(self.train / f"{name}.npy")))

    def put(self, name: str, index: Any, value: float) -> None:
        array = np.load(self.train / f"{name}.npy")
        array[index] = value
        self.save(name, array)

    def swap_splits(self) -> None:
        self.vamp.update(train=self.vamp["validation"], validation=self.vamp["train"])

    def rewrite(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(path.read_bytes()))


class ProteinTrial(Trial):
    """One of the monodecoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.json["train_micro_batch_size_per_gpu"] = 3
        self.monodecoder = {"train": [str(self.train)], "validation": [str(self.validation)]}
        # More codes than the printable alphabet has letters.
        self.monodecoder |= {"codes": 70, "embedding_dim": 4, "hidden": [8, 8], "heads": 1, "feed_forward": 8}
        self.run["engine"] = {"class_path": "Monodecoder", "init_args": self.monodecoder}
        self.run["loss_schedule"] = ["loss"]

    @property
    def train(self) -> Path:
        return self.folder / "train.h5"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.h5"

    def store(
        self, path: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None, structure: int = -1
    ) -> None:
        """Change a data set, or remove it; of the last structure, which only one rank meets, and not at once."""
        with h5py.File(path, "a") as file:
            group = list(file["structs"].values())[structure]
            old = group[name][()]
            del group[name]
            if change is not None:
                group[name] = change(old)
