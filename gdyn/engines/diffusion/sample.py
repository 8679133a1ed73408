"""Ligands for pockets, from a trained run: `gdyn sample`.

A molecule depends on the run, its pocket, its number and the seed. The ranks share the molecules, rank 0 writes them.

Legend: P pockets, B molecules of a batch, n atoms of the largest one, m of the largest pocket, D latent features.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gdyn.engine import plain_lines
from gdyn.engines.diffusion import layout, molecules
from gdyn.engines.diffusion.complexes import Complexes, collate, write_pocket_pdb
from gdyn.engines.diffusion.network import LatentDiffusion
from gdyn.engines.diffusion.pockets import Pocket, read_pockets
from gdyn.engines.diffusion.sampler import Cloud, Kind, Predict, counted_noise, descending, draw, guided
from gdyn.errors import MissingFile, UserError
from gdyn.extras import optional
from gdyn.nn import counters
from gdyn.nn.ragged import pad
from gdyn.splits import stable_key

if TYPE_CHECKING:
    from gdyn.engines.diffusion.engine import Diffusion
    from gdyn.inference import Run
    from gdyn.ranks import RankContext

NUMBER, BATCH_SIZE = 20, 32
DDIM_STEPS = 100
SIZES = 2
"""The stream of random numbers that says how many atoms; the sampler has two."""
FARTHEST = 1e4
"""Å; what is farther has diverged, and files have no columns for it."""
POCKETS_AT_ONCE = 8
"""Encoded in one batch."""
LONGEST_NAME = 200
NEEDED = ("rdkit.Chem", "gemmi", "networkx", "posebusters")

log = logging.getLogger("gdyn")


@dataclass(frozen=True)
class Settings:
    """How molecules are made."""

    number: int
    """Per pocket."""
    sampler: Kind
    steps: int
    guidance: float
    seed: int
    atoms: tuple[int, int] | None
    """Fewest and most, all numbers between equally often; None: sizes as often as in the training data."""


class Job(NamedTuple):
    """A molecule to make."""

    pocket: int
    number: int
    """From 0, within its pocket."""
    key: int
    """Seeds all random numbers of the molecule."""
    atoms: int


class Made(NamedTuple):
    """A molecule without bonds."""

    pocket: int
    number: int
    elements: np.ndarray
    """(n,) int64 atomic numbers."""
    positions: np.ndarray
    """(n, 3) float64 Å, in the frame of the pocket's file."""
    charges: np.ndarray
    """(n,) int64 formal charges."""


class Encoded(NamedTuple):
    """A pocket as the denoiser sees it."""

    x: Tensor
    """(m, 3) Å."""
    h: Tensor
    """(m, features)."""
    centre: Tensor
    """(3,) Å: where the ligand is wanted."""


def sample(
    run: Run,
    pockets: Path,
    output: Path,
    here: RankContext,
    only: str = "*",
    number: int = NUMBER,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: Kind | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    atoms: str | None = None,
    checks: str = "dock_fast",
    workers: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Write the molecules of each pocket as <pocket>.sdf, the pocket as <pocket>_pocket.pdb, a table samples.csv and a
    report into the folder `output`. Every rank must call this.

    Returns what to print, on rank 0. Raises: UserError, MissingFile.
    """
    engine, model = cast("Diffusion", run.engine), _trained(run)
    kind, steps = choose_sampler(model.schedule.timesteps, steps, sampler)
    scale = engine.guidance if guidance is None else guidance
    if not math.isfinite(scale):
        raise UserError(f"--guidance {scale}: a number is expected; 1 is no guidance, and more is more of it.")
    settings = Settings(number, kind, steps, scale, seed, _limits(atoms, len(model.ligand_sizes) - 1))
    found = training = None
    with here.together():
        if here.main:
            training = _training_data(engine)
            found = _begin(training, pockets, only, output, overwrite)
    targets: list[Pocket] = here.broadcast(found)
    log.info(
        "%d molecules for each of %d pockets: %s sampler, %d steps, guidance %g, seed %d.",
        *(number, len(targets), kind, steps, scale, seed),
    )
    with here.together():
        jobs = share(make_jobs(targets, model.ligand_sizes, settings), targets, here)
        made = generate(model.to(here.device), targets, jobs, settings, batch_size, here)
    parts = here.collect(made)
    lines: list[str] = []
    with here.together():
        if parts is not None:
            everything = sorted((item for part in parts for item in part), key=lambda item: (item.pocket, item.number))
            said = {"run": run.dir.path, "checkpoint": run.tag, "pockets": pockets, **asdict(settings)}
            lines = _write(targets, everything, output, training, said, checks, workers)
    return lines


def choose_sampler(timesteps: int, steps: int | None, sampler: Kind | None) -> tuple[Kind, int]:
    """What is not said: DDIM, which needs few steps, unless all are asked for; ancestral sampling takes all.

    Raises: UserError if there are not so many steps.
    """
    sampler = sampler or ("ancestral" if steps == timesteps else "ddim")
    steps = steps or (timesteps if sampler == "ancestral" else min(DDIM_STEPS, timesteps))
    if not 1 <= steps <= timesteps:
        raise UserError(f"--steps {steps}: the run was trained with {timesteps} steps of noise; 1 to {timesteps} work.")
    return sampler, steps


def make_jobs(pockets: Sequence[Pocket], ligand_sizes: Tensor, settings: Settings) -> list[Job]:
    """`settings.number` for each pocket. ligand_sizes: (S,) int64, how many training ligands have so many atoms."""
    of_pockets = torch.tensor([stable_key(pocket.entry.identifier) for pocket in pockets])
    pocket = torch.arange(len(pockets)).repeat_interleave(settings.number)
    number = torch.arange(settings.number).repeat(len(pockets))
    keys = counters.bits(of_pockets[pocket], number, settings.seed % 2**63)
    columns = (pocket, number, keys, draw_sizes(keys, ligand_sizes.cpu(), settings))
    return [Job(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def draw_sizes(keys: Tensor, ligand_sizes: Tensor, settings: Settings) -> Tensor:
    """Numbers of atoms, one for each key, int64."""
    if settings.atoms:
        fewest, most = settings.atoms
        return fewest + counters.integers(keys, 0, SIZES, most - fewest)
    shares = ligand_sizes.double().cumsum(0) / ligand_sizes.sum()
    return torch.searchsorted(shares, counters.uniform(keys, 0, SIZES), right=True)


def share(jobs: Sequence[Job], pockets: Sequence[Pocket], here: RankContext) -> list[Job]:
    """This rank's jobs: about as many pairs of atoms as any other's, of as few pockets as possible."""
    costs = np.array([job.atoms * (job.atoms + len(pockets[job.pocket].entry.pocket["element"])) for job in jobs])
    ranks = (costs.cumsum() - costs / 2) * here.world_size // costs.sum()
    return [job for job, rank in zip(jobs, ranks, strict=True) if rank == here.rank]


@torch.inference_mode()
def generate(
    model: LatentDiffusion,
    pockets: Sequence[Pocket],
    jobs: Sequence[Job],
    settings: Settings,
    batch_size: int,
    here: RankContext,
) -> list[Made]:
    """The molecules of these jobs, in any order."""
    encoded = encode_pockets(model, pockets, sorted({job.pocket for job in jobs}), here.device)
    # Of one size, so that little is padded.
    waiting = sorted(jobs, key=lambda job: (job.atoms, len(encoded[job.pocket].x)))
    made: list[Made] = []
    with tqdm(total=len(jobs), unit="molecule", disable=None if here.main else True, dynamic_ncols=True) as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            made += _molecules(model, batch, [encoded[job.pocket] for job in batch], pockets, settings)
            bar.update(len(batch))
    return made


def encode_pockets(
    model: LatentDiffusion, pockets: Sequence[Pocket], which: Sequence[int], device: torch.device
) -> dict[int, Encoded]:
    encoded: dict[int, Encoded] = {}
    for start in range(0, len(which), POCKETS_AT_ONCE):
        indices = which[start : start + POCKETS_AT_ONCE]
        batch = collate([pockets[index].entry for index in indices])
        batch = {name: values.to(device) for name, values in batch.items()}
        for index, x, h, mask in zip(indices, *model.encode_pocket(batch), batch["pocket_mask"], strict=True):
            centre = torch.from_numpy(pockets[index].centre).to(x)
            encoded[index] = Encoded(x[mask], h[mask], centre)
    return encoded


def _molecules(
    model: LatentDiffusion,
    jobs: Sequence[Job],
    encoded: Sequence[Encoded],
    pockets: Sequence[Pocket],
    settings: Settings,
) -> list[Made]:
    device = encoded[0].x.device
    sizes_b = torch.tensor([job.atoms for job in jobs], device=device)
    mask = torch.arange(int(sizes_b.max()), device=device) < sizes_b[:, None]
    keys_b = torch.tensor([job.key for job in jobs], device=device)
    centre_b3 = torch.stack([pocket.centre for pocket in encoded])
    times = descending(model.schedule.timesteps, settings.steps)
    noise = counted_noise(keys_b, mask, model.ligand_vae.decoder.embedding.in_features)
    predict = guided(denoiser(model, mask, encoded), denoiser(model, mask, None), settings.guidance)
    z_x, z_h = draw(predict, model.schedule, noise, mask, centre_b3, times, settings.sampler)
    decoded = {name: values.cpu() for name, values in model.decode_ligand(z_x, z_h, mask).items()}
    # The last class is everything unknown, of which no atom can be made.
    elements = np.array(layout.ELEMENTS)[decoded["element"][..., :-1].argmax(-1)]
    charges = np.array(layout.CHARGES)[decoded["charge"][..., :-1].argmax(-1)]
    positions = decoded["positions"].double().nan_to_num(FARTHEST).clamp(-FARTHEST, FARTHEST).numpy()
    return [
        Made(
            job.pocket, job.number, elements[b, :n], positions[b, :n] + pockets[job.pocket].entry.centre, charges[b, :n]
        )
        for b, (job, n) in enumerate(zip(jobs, sizes_b.tolist(), strict=True))
    ]


def denoiser(model: LatentDiffusion, mask: Tensor, encoded: Sequence[Encoded] | None) -> Predict:
    """The noise that the averaged weights find in ligands in these pockets; None: in ligands without a pocket."""
    b = len(mask)
    keep_b = torch.full((b,), encoded is not None, device=mask.device)
    if encoded is not None:
        lengths = torch.tensor([len(pocket.x) for pocket in encoded], device=mask.device)
        (x, pocket_mask), (h, _) = (pad(torch.cat([pocket[i] for pocket in encoded]), lengths) for i in (0, 1))
    else:
        # In place of a pocket the network puts one atom of its own.
        features = len(model.denoiser.null_pocket)
        x, h, pocket_mask = (
            mask.new_zeros(b, 1, 3).float(),
            mask.new_zeros(b, 1, features).float(),
            mask.new_ones(b, 1),
        )

    def predict(t_b: Tensor, z_x: Tensor, z_h: Tensor) -> Cloud:
        return model.predict_noise(t_b, z_x, z_h, mask, x, h, pocket_mask, keep_b, averaged=True)

    return predict


def _trained(run: Run) -> LatentDiffusion:
    """Raises: UserError if the checkpoint is from before the denoiser's training."""
    model = cast(LatentDiffusion, run.model)
    if not model.denoiser_average.updates:
        raise UserError(
            f"checkpoint {run.tag} of {run.dir.path} has no trained denoiser; train the phase denoiser or joint first, "
            "or choose a later --checkpoint."
        )
    return model


def _limits(atoms: str | None, largest: int) -> tuple[int, int] | None:
    if atoms is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", atoms)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most <= largest:
        raise UserError(f"--atoms {atoms}: a number or MIN:MAX, from 1 to {largest}, is expected, e.g. 25 or 20:30.")
    return fewest, most


def _training_data(engine: Diffusion) -> Complexes | None:
    try:
        return Complexes(engine.train)
    except MissingFile as error:
        log.warning("%s So novelty is not known, and pockets are cut as by default.", error)
        return None


def _begin(training: Complexes | None, pockets: Path, only: str, output: Path, overwrite: bool) -> list[Pocket]:
    """All that can fail fails before the work."""
    for module in NEEDED:
        optional(module, "sample")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"--output {output} is not empty; choose another, or replace files in it with --overwrite.")
    if output.resolve() == pockets.resolve():
        raise UserError(f"--output {output} has the pockets themselves; choose another.")
    found = read_pockets(pockets, **(training.attributes if training else {}))
    chosen = [pocket for pocket in found if fnmatch.fnmatchcase(pocket.entry.identifier, only)]
    if not chosen:
        names = ", ".join(pocket.entry.identifier for pocket in found[:3])
        raise UserError(f"--only {only} matches none of the {len(found)} pockets in {pockets}; the first are {names}.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}.") from None
    return chosen


def _write(
    pockets: Sequence[Pocket],
    made: Sequence[Made],
    output: Path,
    training: Complexes | None,
    settings: dict[str, Any],
    checks: str,
    workers: int,
) -> list[str]:
    """The molecules of `made`, which are ordered. Each file appears whole or not at all, the report last. Returns what
    to print."""
    _warn_of_diverged(pockets, made)
    identifiers = [pocket.entry.identifier for pocket in pockets]
    names = dict(zip(identifiers, file_names(identifiers), strict=True))
    found: dict[str, list[Any]] = {identifier: [] for identifier in identifiers}
    for item in made:
        molecule = molecules.build(item.elements, item.positions, item.charges)
        found[identifiers[item.pocket]].append(molecule)
    files = {identifier: output / f"{name}_pocket.pdb" for identifier, name in names.items()}
    for pocket in pockets:
        with _whole(files[pocket.entry.identifier]) as partial:
            write_pocket_pdb(pocket.entry, partial)
    rows = molecules.table(found, files, set(training.smiles) - {""} if training else set(), checks, workers)
    scores = molecules.summary(rows, found)
    if training is None:
        rows = [row | {"novel": None} for row in rows]
        scores = {name: part | {"novelty": None} for name, part in scores.items()}
    for identifier, group in found.items():
        with _whole(output / f"{names[identifier]}.sdf") as partial:
            molecules.write_sdf(partial, {identifier: group}, [row for row in rows if row["pocket"] == identifier])
    with _whole(output / "samples.csv") as partial:
        molecules.write_csv(partial, rows)
    report = molecules.write_report(output, rows, scores, found, settings)
    shown = {name: value for name, value in scores["all"].items() if not name.startswith("pb_") or name == "pb_pass"}
    return [*plain_lines(shown), f"molecules, table  {output}", f"report            {report}"]


def _warn_of_diverged(pockets: Sequence[Pocket], made: Sequence[Made]) -> None:
    far = sum(np.abs(item.positions - pockets[item.pocket].entry.centre).max() >= FARTHEST for item in made)
    if far:
        log.warning("%d of %d molecules diverged; try less --guidance or more --steps.", far, len(made))


def file_names(identifiers: Sequence[str]) -> list[str]:
    """Names of files for pockets, all different on any file system; an identifier may be a path."""
    names: list[str] = []
    for identifier in identifiers:
        name = plain = re.sub(r"[^\w.+-]", "_", identifier).lstrip(".")[-LONGEST_NAME:] or "pocket"
        times = 1
        while name.lower() in {taken.lower() for taken in names}:
            times += 1
            name = f"{plain}-{times}"
        names.append(name)
    return names


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when it is written, and vanishes if not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
