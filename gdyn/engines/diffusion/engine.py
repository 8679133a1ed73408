"""The diffusion engine: ligands generated in protein pockets by diffusion in the latent space of equivariant
autoencoders."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)
from torch import Tensor, nn

from gdyn.collectives import sum_over_ranks
from gdyn.engine import Dataset, Engine, Step
from gdyn.engines.diffusion import losses
from gdyn.engines.diffusion.autoencoder import (
    LIGAND_CLASSES,
    POCKET_CLASSES,
    Autoencoder,
    accuracy_sums,
    kl_sum,
    reconstruction_sums,
)
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.engines.diffusion.denoiser import Denoiser
from gdyn.engines.diffusion.network import (
    EVALUATION,
    LatentDiffusion,
    Window,
    ligand_of,
    network_of,
    pocket_of,
)
from gdyn.errors import UserError
from gdyn.evaluation import evaluate_alone
from gdyn.nn.noise import NoiseSchedule
from gdyn.phases import Phase
from gdyn.splits import Part

if TYPE_CHECKING:
    from gdyn.inference import Run
    from gdyn.ranks import RankContext

LARGEST_LIGAND = 512
"""Atoms; the length of the histogram of sizes."""
PARTS = {"ligand": ("ligand_vae", LIGAND_CLASSES), "protein": ("protein_vae", POCKET_CLASSES)}
"""What is autoencoded: the objective, and properties of atoms."""
SUMS = (
    *(
        f"{part}_{name}"
        for part, (_, classes) in PARTS.items()
        for name in ("positions", *classes, "kl", "original", "rmsd", *(f"{c}_right" for c in classes), "atoms")
    ),
    *("denoiser", "predict_zero", "complexes", "draws"),
)
"""What is summed over micro-batches, ranks and a whole split."""


@dataclass(frozen=True)
class Diffusion(Engine):
    """Latent diffusion of ligands in protein pockets: E(n)-equivariant autoencoders of ligand and pocket, and a
    denoiser in the ligand's latent space that sees the pocket's.

    Phases: ligand_vae, protein_vae, denoiser (both autoencoders frozen), or joint (all at once, gradients into all).
    """

    train: list[str]
    """HDF5 files of complexes to learn from (`gdyn prepare complexes`)."""

    validation: list[str] | None = None
    """HDF5 files that choose the best checkpoint; without them a share of the training complexes is held out."""

    test: list[str] | None = None
    """HDF5 files for the final scores; never used for a choice."""

    validation_share: ClosedUnitInterval = 0.1
    """Which share is held out where `validation` names no file, chosen by a hash of the complexes' names."""

    latent: PositiveInt = 32
    """Latent features of an atom, beside its three coordinates."""

    hidden: PositiveInt = 128
    """Width of the autoencoders."""

    blocks: PositiveInt = 3
    """Blocks of each of an autoencoder's two networks."""

    denoiser_hidden: PositiveInt = 256
    """Width of the denoiser."""

    denoiser_blocks: PositiveInt = 3
    """Blocks of the denoiser."""

    cross_attentions: PositiveInt = 2
    """Layers of the denoiser that look at the pocket."""

    cutoff: PositiveFloat = 8.0
    """Å; pocket atoms farther from a ligand atom are not seen by it."""

    sublayers: PositiveInt = 2
    """Message layers per block."""

    attention: bool = False
    """A gate in (0, 1) on every message."""

    tanh: bool = False
    """Bound the steps of coordinates."""

    norm_constant: NonNegativeFloat = 0.0
    """Å, added to the distances by which differences of coordinates are divided; GeoLDM has 1."""

    normalization: Literal["sum", "mean"] = "sum"
    """Messages are added up and divided by 100, or averaged."""

    posterior_sigma: NonNegativeFloat = 0.0032
    """Standard deviation of the posterior, Å and latent units."""

    kl_weight: NonNegativeFloat = 0.01
    """Of the posterior's KL divergence, relative to the reconstruction. It acts on the coordinates: that of the
    normalised features is constant."""

    schedule: Literal["polynomial_2", "cosine"] = "polynomial_2"
    """How noise grows with time."""

    timesteps: PositiveInt = 1000
    """T."""

    precision: OpenUnitInterval = 1e-4
    """Least share of signal and of noise, of polynomial_2; GeoLDM has 1e-5."""

    prediction: Literal["velocity", "noise"] = "velocity"
    """What the denoiser's outputs are, of which the noise is made; noise: itself, as in the original. The losses are of
    the noise either way."""

    diffusion_loss: Literal["l2", "vlb"] = "l2"
    """l2: error of the noise per atom and dimension; vlb: the variational bound, nats per ligand."""

    guidance_dropout: ClosedUnitInterval = 0.1
    """Share of complexes whose pocket the denoiser does not see, drawn anew in each step; what guidance needs."""

    guidance: float = 7.5
    """Scale of the guidance when sampling, unless the command says otherwise; 1 is none."""

    ema_decay: ClosedUnitInterval = 0.999
    """Of the moving average of the denoiser's weights, with which it is evaluated and samples are made; 0: the weights
    themselves."""

    validation_draws: PositiveInt = 4
    """Times and noises per complex when the denoiser is evaluated."""

    compat: bool = False
    """Losses of the original program, to compare with its logs: padded atoms count, and of an atom's properties only
    the element is learned."""

    cache_mb: NonNegativeInt = 1024
    """MiB of the frozen autoencoders' latents that each process keeps in the phase denoiser."""

    gradient_checkpointing: bool = False
    """Less memory for more time: activations are computed again in the backward pass."""

    calls_depend_on_data: ClassVar[bool] = True  # groups of like size; latents that are kept
    like_sizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            paths = getattr(self, split)
            # Absolute, so that the run's own copy of the run file works from any folder.
            object.__setattr__(self, split, paths and [str(Path(path).absolute()) for path in paths])

    # -- network and data ---------------------------------------------------------------------------------------------

    def model(self) -> LatentDiffusion:
        network = (self.sublayers, self.attention, self.tanh, self.norm_constant, self.normalization)
        shape = (self.hidden, self.latent, self.blocks, *network, self.gradient_checkpointing)
        return LatentDiffusion(
            Autoencoder(LIGAND_CLASSES, *shape),
            Autoencoder(POCKET_CLASSES, *shape),
            Denoiser(
                self.latent,
                self.latent,
                self.denoiser_hidden,
                self.denoiser_blocks,
                self.sublayers,
                self.cross_attentions,
                self.cutoff,
                *network[1:],
                self.gradient_checkpointing,
            ),
            NoiseSchedule(self.schedule, self.timesteps, self.precision),
            self._ligand_sizes(),
            self.posterior_sigma,
            self.guidance_dropout,
            self.prediction,
            self.cache_mb << 20,
        )

    def _ligand_sizes(self) -> Tensor:
        """(LARGEST_LIGAND + 1,) int64. Zeros where the training files are not: checkpoints hold the numbers."""
        counts = torch.zeros(LARGEST_LIGAND + 1, dtype=torch.int64)
        if all(Path(path).is_file() for path in self.train):
            found = torch.from_numpy(Complexes(self.train).ligand_sizes)[: LARGEST_LIGAND + 1]
            counts[: len(found)] = found
        return counts

    def datasets(self) -> dict[str, Dataset]:
        if not self.train:
            raise UserError("engine.train names no file; give at least one HDF5 file of `gdyn prepare complexes`.")
        train = Complexes(self.train)
        splits: dict[str, Dataset] = {"train": train}
        if self.validation:
            splits["validation"] = Complexes(self.validation)
        else:
            splits["train"], splits["validation"] = Part.split(train, self.validation_share)
        if self.test:
            splits["test"] = Complexes(self.test)
        return splits

    # -- phases -------------------------------------------------------------------------------------------------------

    def objectives(self) -> tuple[str, ...]:
        return ("ligand_vae", "protein_vae", "denoiser", "joint")

    def trains(self, objective: str) -> tuple[str, ...]:
        return ("*",) if objective == "joint" else (f"{objective}.*",)

    def needs(self, objective: str) -> tuple[str, ...]:
        """A denoiser in the latent space of untrained autoencoders learns nothing of use."""
        return ("ligand_vae.*", "protein_vae.*") if objective == "denoiser" else ()

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """The averaged denoiser, and the same noise in every evaluation."""
        network = network_of(model)
        network.evaluating = True
        try:
            yield
        finally:
            network.evaluating = False

    def param_groups(self, model: nn.Module, phase: Phase) -> None:
        """Raises: UserError where a phase that runs the autoencoders without gradients is to train them."""
        frozen = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("denoiser.")]
        if phase.objective == "denoiser" and frozen:
            raise UserError(
                f"phase {phase.label}: trains {list(phase.trains)} includes {frozen[0]}, but the objective denoiser "
                "trains the denoiser only; leave trains out, or choose the objective joint."
            )

    # -- one step -----------------------------------------------------------------------------------------------------

    def begin_window(
        self, model: nn.Module, batches: list[dict[str, Tensor]], phase: Phase, here: RankContext
    ) -> Window:
        """Every rank must call this. Counts what the losses are means over, before any forward pass."""
        network = network_of(model)
        counts = [
            torch.stack([batch["ligand_mask"].sum(), batch["pocket_mask"].sum(), _complexes(batch)])
            for batch in batches
        ]
        total = torch.stack(counts).sum(0)
        if here.world_size > 1:
            total = sum_over_ranks(total)
        names = ("ligand_atoms", "protein_atoms", "complexes")
        return Window(
            step=EVALUATION if network.evaluating else int(network.steps_done),
            draws=self.validation_draws if network.evaluating else 1,
            averaged=network.evaluating,
            counts=dict(zip(names, total, strict=True)),
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor], phase: Phase, window: Window) -> Step:
        sums = self._sums(model(batch, phase.objective, window), batch, network_of(model).schedule)
        shares = self._scores(sums, window.counts | {"draws": window.counts["complexes"] * window.draws})
        # Logged are means weighted by complexes, and the shares are to add up.
        complexes = len(batch["keys"])
        scale = window.counts["complexes"] / complexes
        loss = shares[phase.objective]
        zero = loss.new_zeros(())
        return Step(
            loss=loss,
            metrics={name: (value * scale).detach() for name, value in {"loss": loss, **shares}.items()},
            weight=float(complexes),
            statistics=torch.stack([sums.get(name, zero).detach().double() for name in SUMS]),
        )

    def _sums(
        self, outputs: dict[str, dict[str, Tensor]], batch: dict[str, Tensor], schedule: NoiseSchedule
    ) -> dict[str, Tensor]:
        """Those of SUMS that the outputs give."""
        sums = {"complexes": _complexes(batch)}
        for part, of in (("ligand", ligand_of), ("protein", pocket_of)):
            if part in outputs:
                features, x, mask = of(batch)
                found = {name: outputs[part][name] for name in ("positions", *features)}
                z_x, z_h = outputs[part]["z_x"], outputs[part]["z_h"]
                rights = accuracy_sums(found, features, x, mask)
                named = {f"{name}_right" if name in features else name: value for name, value in rights.items()}
                named |= reconstruction_sums(found, features, x, mask)
                named |= {"kl": kl_sum(z_x, z_h, mask), "atoms": mask.sum()}
                if self.compat:
                    named["original"] = losses.original_reconstruction(part, outputs[part], features, x, mask).sum()
                sums |= {f"{part}_{name}": value for name, value in named.items()}
        if "noise" in outputs:
            noise, atoms_b = outputs["noise"], batch["ligand_mask"].sum(1)
            sums["denoiser"] = self._errors(noise, atoms_b, schedule).sum()
            sums["predict_zero"] = self._errors(losses.without_prediction(noise), atoms_b, schedule).sum()
            sums["draws"] = noise["t"].new_tensor(noise["t"].numel())
        return sums

    def _errors(self, noise: dict[str, Tensor], atoms_b: Tensor, schedule: NoiseSchedule) -> Tensor:
        """(draws, complexes)"""
        if self.diffusion_loss == "vlb":
            return losses.vlb(noise, atoms_b, schedule)
        return losses.original_l2(noise) if self.compat else losses.l2(noise, atoms_b)

    def _scores(self, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Objectives, the terms they are made of, and accuracies, from sums of a micro-batch or a split and what they
        are to be divided by."""
        scores: dict[str, Tensor] = {}
        for part, (objective, classes) in PARTS.items():
            if f"{part}_atoms" not in sums:
                continue
            atoms, complexes = counts[f"{part}_atoms"], counts["complexes"]
            terms = {name: sums[f"{part}_{name}"] / atoms for name in ("positions", *classes, "kl")}
            reconstruction = torch.stack([terms[name] for name in ("positions", *classes)]).sum()
            scores[objective] = (
                sums[f"{part}_original"] / complexes if self.compat else reconstruction + self.kl_weight * terms["kl"]
            )
            terms |= {f"{name}_accuracy": sums[f"{part}_{name}_right"] / atoms for name in classes}
            terms["rmsd"] = sums[f"{part}_rmsd"] / complexes
            scores |= {f"{part}_{name}": value for name, value in terms.items()}
        if "denoiser" in sums:
            scores["denoiser"] = sums["denoiser"] / counts["draws"]
            scores["predict_zero"] = sums["predict_zero"] / counts["draws"]
        if {"ligand_vae", "protein_vae", "denoiser"} <= scores.keys():
            scores["joint"] = scores["ligand_vae"] + scores["protein_vae"] + scores["denoiser"]
        return scores

    def end_window(self, model: nn.Module, steps: list[Step], phase: Phase, window: Window, here: RankContext) -> None:
        """Every rank must call this. Moves the average of the denoiser's weights, where they are trained."""
        network = network_of(model)
        network.steps_done += 1
        if phase.objective in ("denoiser", "joint"):
            network.denoiser_average.update(network.denoiser, self.ema_decay)

    def pooled(self, statistics: Tensor) -> dict[str, Any]:
        """Scores over a whole split: losses per atom (ligand_vae, protein_vae; positions Å^2, classes nats) or per
        complex (denoiser), root-mean-square deviations, Å, and accuracies."""
        sums = dict(zip(SUMS, statistics, strict=True))
        absent = {part for part in PARTS if not sums[f"{part}_atoms"]}
        present = {
            name: value
            for name, value in sums.items()
            if name.split("_")[0] not in absent and (sums["draws"] or name not in ("denoiser", "predict_zero"))
        }
        return {name: float(value) for name, value in self._scores(present, present).items()}

    # -- a finished run -----------------------------------------------------------------------------------------------

    def evaluate(self, run: Run, sources: list[str]) -> dict[str, Any]:
        """Reconstruction and denoising of the complexes in these files, with fixed noise: ligand_rmsd, protein_rmsd
        (Å), accuracies of each property, denoiser_loss and predict_zero_loss (that of a denoiser which finds no noise),
        and the losses of the autoencoders. What the run has not trained is None."""
        return self.scores(run, Complexes(sources))

    def scores(self, run: Run, data: Dataset) -> dict[str, Any]:
        """`evaluate` of a data set."""
        result: dict[str, Any] = {"complexes": len(data)}
        for objective in ("ligand_vae", "protein_vae", "denoiser"):
            scores = evaluate_alone(self, run.model, data, Phase(objective, 1))
            scores = {name: value for name, value in scores.items() if not name.startswith("batch_")}
            del scores["loss"]
            trained = _trained(run, objective)
            result |= {NAMES.get(name, name): value if trained else None for name, value in scores.items()}
        return result

    def sample(self, run: Run, pockets: Path, output: Path, here: RankContext, **options: Any) -> list[str]:
        from gdyn.engines.diffusion.sample import sample  # what it imports is not needed to train

        return sample(run, pockets, output, here, **options)

    def report(self, run: Run, **options: Any) -> dict[str, Any]:
        from gdyn.engines.diffusion.report import report  # nor is matplotlib

        return report(run, **options)

    def headline(self, summary: dict[str, Any]) -> list[str]:
        split = "test" if "test" in summary else "validation"
        scores = summary[split]
        lines = []
        for part in PARTS:
            if f"{part}_rmsd" in scores:
                lines.append(
                    f"{split} {part:<8} RMSD {scores[f'{part}_rmsd']:.3f} Å, {scores[f'{part}_element_accuracy']:.1%} "
                    "of elements right"
                )
        if "denoiser" in scores:
            lines.append(
                f"{split} denoiser loss {scores['denoiser']:.4f}, {scores['predict_zero']:.4f} where nothing is "
                "predicted"
            )
        return lines


NAMES = {"denoiser": "denoiser_loss", "predict_zero": "predict_zero_loss"}
"""Of `evaluate`, where they differ from the scores'."""


def _trained(run: Run, objective: str) -> bool:
    """Whether the run has trained this part, or began from another run's."""
    done, begun = {phase.objective for phase in run.config.plan.phases}, run.config.init_from or {}
    begun_from = isinstance(begun, str) or any(fnmatch.fnmatchcase(f"{objective}.", glob) for glob in begun)
    return bool({objective, "joint"} & done) or begun_from


def _complexes(batch: dict[str, Tensor]) -> Tensor:
    return batch["keys"].new_tensor(len(batch["keys"]))
