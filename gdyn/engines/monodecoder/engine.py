"""The monodecoder engine: a graph VQ autoencoder that turns protein structures into strings of a learned alphabet."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt
from torch import Tensor, nn

from gdyn.collectives import sum_over_ranks
from gdyn.engine import Dataset, Engine, Step
from gdyn.engines.monodecoder import layout, losses
from gdyn.engines.monodecoder.autoencoder import Autoencoder
from gdyn.engines.monodecoder.decoders import Decoders
from gdyn.engines.monodecoder.encoder import Encoder
from gdyn.engines.monodecoder.pairs import Pairs, sample_pairs
from gdyn.engines.monodecoder.quantizer import Quantizer
from gdyn.engines.monodecoder.structures import Structures, feature_width
from gdyn.errors import UserError
from gdyn.phases import Phase
from gdyn.schedules import Schedule, final, value
from gdyn.splits import Part

if TYPE_CHECKING:
    from gdyn.inference import Run
    from gdyn.ranks import RankContext

DECODER_HEADS = 5
"""Most attention heads of the sequence decoder; the largest divisor of its width is taken."""


@dataclass(frozen=True)
class Weights:
    """Weights of the losses, each a number or a schedule (start, end, steps, shape); the numbers are foldtree2's."""

    aa: NonNegativeFloat | Schedule = 1.0
    """Amino acids: cross-entropy, nats per residue."""

    edge: NonNegativeFloat | Schedule = 0.25
    """Contacts: -log p of contacts plus -log (1 - p) of as many pairs that are none."""

    logit: NonNegativeFloat | Schedule = 0.25
    """CA distances: cross-entropy over 8 ranges, of contacts plus of other pairs."""

    fft2: NonNegativeFloat | Schedule = 0.01
    """Two-dimensional spectrum of the distance matrix: smooth L1."""

    vq: NonNegativeFloat | Schedule = 0.1
    """Vector quantization: how far residues lie from their codes."""

    angles: NonNegativeFloat | Schedule = 0.05
    """phi, psi, omega: smooth L1 of the wrapped difference, rad."""

    ss: NonNegativeFloat | Schedule = 0.25
    """Secondary structure: cross-entropy, nats per residue."""

    foldx: NonNegativeFloat | Schedule = 0.01
    """FoldX energies: smooth L1."""

    def at(self, step: int) -> dict[str, float]:
        """After `step` finished optimizer steps."""
        return {f.name: value(getattr(self, f.name), step) for f in fields(self)}

    def final(self) -> dict[str, float]:
        """What they come to."""
        return {f.name: final(getattr(self, f.name)) for f in fields(self)}


class Window(NamedTuple):
    """What a micro-batch needs to know of its optimizer step."""

    step: int
    """Optimizer steps that are finished."""
    weights: dict[str, float]
    commitment: float
    counts: losses.Counts
    """Over all ranks and micro-batches, what the losses are divided by."""


class Sums(NamedTuple):
    """What is summed over micro-batches, ranks and a whole split."""

    aa: Tensor
    aa_right: Tensor
    edge_contacts: Tensor
    edge_others: Tensor
    logit_contacts: Tensor
    logit_others: Tensor
    ss: Tensor
    ss_right: Tensor
    angles: Tensor
    angles_off: Tensor
    """Absolute differences, rad."""
    codebook: Tensor
    commitment: Tensor
    fft2: Tensor
    foldx: Tensor


@dataclass(frozen=True)
class Monodecoder(Engine):
    """Graph VQ autoencoder of protein structures (foldtree2's monodecoder): one letter per residue, from which amino
    acids, contacts, angles, secondary structure and distance spectra are decoded."""

    train: list[str]
    """HDF5 files of structures to learn from (`gdyn prepare proteins`, or foldtree2's own)."""

    validation: list[str] | None = None
    """HDF5 files that choose the best checkpoint; without them a share of the training structures is held out."""

    test: list[str] | None = None
    """HDF5 files for the final scores; never used for a choice."""

    validation_share: ClosedUnitInterval = 0.1
    """Which share is held out where `validation` names no file, chosen by a hash of the structures' names."""

    features: PositiveInt | None = None
    """Columns of `res`, found in the first training file."""

    compat: bool = False
    """The files are foldtree2's own: undo the shift of their amino-acid labels."""

    codes: PositiveInt = 40
    """Letters of the alphabet, K."""

    embedding_dim: PositiveInt = 128
    """Dimensions of a code, D."""

    encoder: Literal["mk1", "mk1_muon"] = "mk1"
    """mk1_muon: the same network, whose body's matrices are for Muon where the DeepSpeed JSON's optimizer is Muon."""

    decoders: Literal["multi", "multi_muon"] = "multi"
    """multi_muon: likewise."""

    hidden: list[PositiveInt] = field(default_factory=lambda: [256, 256, 256])
    """Widths of the encoder: of what enters the first graph convolution, and of what leaves each."""

    heads: PositiveInt = 16
    """Attention heads of the graph convolutions."""

    feed_forward: PositiveInt = 2048
    """Width inside the transformer layers of the sequence decoder."""

    dropout: ClosedUnitInterval = 0.01
    """Of encoder and decoders."""

    links: list[str] = field(default_factory=lambda: ["contactPoints"])
    """Edges between residues that the encoder follows, as the files name them."""

    concat_positions: bool = True
    """Whether the encoder sees the place of a residue in its chain."""

    fftin: bool = True
    """Whether the encoder sees the spectrum of a residue's distances."""

    ema: bool = True
    """Codes are running means of what was assigned to them; false: they are trained by gradient."""

    ema_decay: OpenUnitInterval = 0.99
    """Share of the running means that an optimizer step leaves; 0.99 remembers about 100 steps, too many for a short
    run."""

    revive_after: PositiveInt = 20
    """Optimizer steps without use after which a code is moved next to a much-used one."""

    commitment: NonNegativeFloat | Schedule = 0.9
    """Commitment cost β, a number or a schedule."""

    weights: Weights = field(default_factory=Weights)

    mask_plddt: bool = False
    """Leave residues of low confidence out of the losses of angles, secondary structure, contacts and distances."""

    plddt_threshold: ClosedUnitInterval = 0.3
    """Confidence, 0..1, that counts as low."""

    output_fft: bool = True
    """Decode the two-dimensional spectrum."""

    output_foldx: bool = False
    """Decode FoldX energies, which the files must have."""

    max_residues: PositiveInt | None = None
    """Residues per rank and micro-batch at most; batch_size is then the most structures."""

    gradient_checkpointing: bool = False
    """Less memory for more time: activations of graph convolutions and transformer layers are computed again."""

    cache_mb: NonNegativeInt = 256
    """MiB of structures kept in memory by each process that reads them."""

    size_key: ClassVar[str] = "max_residues"
    shown: ClassVar[tuple[str, ...]] = ("aa", "ss_accuracy", "codebook_perplexity")

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            paths = getattr(self, split)
            # Absolute, so that the run's own copy of the run file works from any folder.
            object.__setattr__(self, split, paths and [str(Path(path).absolute()) for path in paths])
        if self.features is None and self.train and Path(self.train[0]).is_file():
            # On record, so that a trained run can be used where its training files are not.
            object.__setattr__(self, "features", feature_width(Path(self.train[0])))

    @property
    def max_size(self) -> int | None:
        return self.max_residues

    def model(self) -> Autoencoder:
        if self.codes < 2:
            raise UserError(f"engine.codes = {self.codes}; an alphabet has at least 2 letters.")
        if len(self.hidden) < 2:
            raise UserError(f"engine.hidden = {list(self.hidden)}; at least 2 widths are one graph convolution.")
        if self.features is None:
            raise UserError("engine.features is not known, because the training file is not there; give it.")
        encoder = Encoder(
            self.features,
            self.hidden,
            self.heads,
            self.embedding_dim,
            self.links,
            self.dropout,
            checkpoint=self.gradient_checkpointing,
            positions=self.concat_positions,
            spectra=self.fftin,
        )
        quantizer = Quantizer(self.codes, self.embedding_dim, self.ema, self.ema_decay, revive_after=self.revive_after)
        decoders = Decoders(
            self.embedding_dim,
            self.hidden[-1],
            DECODER_HEADS,
            self.dropout,
            spectrum=self.output_fft,
            foldx=self.output_foldx,
            checkpoint=self.gradient_checkpointing,
            feed_forward=self.feed_forward,
        )
        return Autoencoder(encoder, quantizer, decoders)

    def structures(self, paths: list[str]) -> Structures:
        """Raises: UserError, MissingFile."""
        return Structures(
            [Path(path) for path in paths],
            edges=tuple(dict.fromkeys(["contactPoints", *self.links])),
            spectrum_2d=self.output_fft,
            foldx=self.output_foldx,
            compat=self.compat,
            cache_bytes=self.cache_mb << 20,
        )

    def datasets(self) -> dict[str, Dataset]:
        if not self.train:
            raise UserError("engine.train names no file; give at least one HDF5 file.")
        train = self.structures(self.train)
        splits: dict[str, Dataset] = {"train": train}
        if self.validation:
            splits["validation"] = self.structures(self.validation)
        else:
            splits["train"], splits["validation"] = Part.split(train, self.validation_share)
        if self.test:
            splits["test"] = self.structures(self.test)
        self._check(splits)
        return splits

    def _check(self, splits: dict[str, Dataset]) -> None:
        """Raises: UserError if structures are not as wide as `features` says, or energies to learn are nowhere."""
        for name, part in splits.items():
            whole = part.whole if isinstance(part, Part) else cast(Structures, part)
            if whole.feature_width != self.features:
                raise UserError(
                    f"engine.{name}: {whole.paths[0]} has {whole.feature_width} features per residue, engine.features "
                    f"(of the first training file, if not given) is {self.features}; prepare all files alike."
                )
            if name == "train" and self.output_foldx and not whole.has_foldx():
                raise UserError(
                    f"engine.output_foldx is true, but no structure in {whole.paths[0]} has energies (node/Foldx/x); "
                    "add them, or leave output_foldx out."
                )

    def notices(self, train: Dataset, samples_per_window: int) -> list[str]:
        assert isinstance(train, Structures | Part)
        residues = samples_per_window * float(train.sizes.mean())
        if residues < 10 * self.codes:
            return [
                f"about {residues:.0f} residues per step are few for {self.codes} codes; {10 * self.codes} or more "
                "advised."
            ]
        return []

    @property
    def least_plddt(self) -> float | None:
        """Below it, residues do not count for what depends on the structure; None: all count."""
        return self.plddt_threshold if self.mask_plddt else None

    def begin_window(
        self, model: nn.Module, batches: list[dict[str, Tensor]], phase: Phase, here: RankContext
    ) -> Window:
        """Every rank must call this. Counts what the losses are means over, before any forward pass."""
        step = int(_network(model).steps_done)
        counts = [losses.counts(batch, sample_pairs(batch, step), self.least_plddt) for batch in batches]
        total = torch.stack([torch.stack(of_batch) for of_batch in counts]).sum(0)
        if here.world_size > 1:
            total = sum_over_ranks(total)
        return Window(step, self.weights.at(step), value(self.commitment, step), losses.Counts(*total))

    def loss(self, model: nn.Module, batch: dict[str, Tensor], phase: Phase, window: Window) -> Step:
        pairs = sample_pairs(batch, window.step)
        decoded = model(batch, pairs.index)
        sums = self._sums(decoded, batch, pairs)
        own = losses.counts(batch, pairs, self.least_plddt)
        terms = self._terms(sums, window.counts, window.commitment)
        loss = torch.stack([window.weights[name] * term for name, term in terms.items()]).sum()
        # Logged are means weighted by residues. Each share of the window's loss is scaled by the reciprocal of this
        # micro-batch's share of the residues, so that their mean is the window's loss, whose terms have other counts.
        scale = window.counts.residues / own.residues
        assigned = _network(model).quantizer.statistics(decoded["encoded"].detach(), decoded["codes"])
        additive = torch.stack([value.detach().double() for value in [*sums, *own]])
        return Step(
            loss=loss,
            metrics={name: (term * scale).detach() for name, term in {"loss": loss, **terms}.items()},
            weight=float(len(batch["features"])),
            statistics=torch.cat([assigned, additive]),
        )

    def _sums(self, decoded: dict[str, Tensor], batch: dict[str, Tensor], pairs: Pairs) -> Sums:
        known = losses.masks(batch, pairs, self.least_plddt)
        nothing = decoded["aa_logits"].new_zeros(())
        return Sums(
            *losses.classes(decoded["aa_logits"], batch["amino_acids"], known.amino_acids),
            *losses.contacts(decoded["contact_logits"], pairs, known.pairs),
            *losses.distances(decoded["distance_logits"], batch["coordinates"], pairs, known.pairs),
            *losses.classes(decoded["ss_logits"], batch["secondary"], known.secondary),
            *losses.angles(decoded["angles"], batch["angles"], known.angles),
            *losses.quantization(decoded["encoded"], decoded["quantized"]),
            losses.spectrum(decoded["spectrum_2d"], batch["spectrum_2d"]) if self.output_fft else nothing,
            losses.foldx(decoded["foldx"], batch["foldx"], known.foldx) if self.output_foldx else nothing,
        )

    def _terms(self, sums: Sums, counts: losses.Counts, commitment: float) -> dict[str, Tensor]:
        """Each loss, a mean over what it is a loss of."""
        residues = counts.residues
        vq = commitment * sums.commitment if self.ema else commitment * sums.commitment + sums.codebook
        terms = {
            "aa": _mean(sums.aa, counts.amino_acids),
            "edge": _mean(sums.edge_contacts, counts.contacts) + _mean(sums.edge_others, counts.others),
            "logit": _mean(sums.logit_contacts, counts.contacts) + _mean(sums.logit_others, counts.others),
            "ss": _mean(sums.ss, counts.secondary),
            "angles": _mean(sums.angles, counts.angles),
            "vq": _mean(vq, residues),
        }
        if self.output_fft:
            terms["fft2"] = _mean(sums.fft2, counts.structures * 2 * layout.SPECTRUM_2D_WIDTH)
        if self.output_foldx:
            terms["foldx"] = _mean(sums.foldx, counts.foldx)
        return terms

    def end_window(self, model: nn.Module, steps: list[Step], phase: Phase, window: Window, here: RankContext) -> None:
        """Every rank must call this. Moves the codes by what all ranks and micro-batches assigned to them."""
        network = _network(model)
        total = torch.stack([step.statistics for step in steps if step.statistics is not None]).sum(0)
        if here.world_size > 1:
            total = sum_over_ranks(total)
        network.quantizer.update(total[: network.quantizer.statistics_width])
        network.steps_done += 1

    def pooled(self, statistics: Tensor) -> dict[str, Any]:
        """Losses, with schedules at their end so that epochs compare; accuracies, mean absolute error of the angles in
        degrees, perplexity of the codes and how many are used, over a whole split."""
        n_sums, n_counts = len(Sums._fields), len(losses.Counts._fields)
        sums = Sums(*statistics[-n_sums - n_counts : -n_counts])
        counts = losses.Counts(*statistics[-n_counts:])
        terms = self._terms(sums, counts, final(self.commitment))
        weights = self.weights.final()
        used = statistics[: -n_sums - n_counts].view(self.codes, -1)[:, 0]
        scores = {
            "loss": sum(weights[name] * term for name, term in terms.items()),
            **terms,
            "aa_accuracy": _mean(sums.aa_right, counts.amino_acids),
            "ss_accuracy": _mean(sums.ss_right, counts.secondary),
            "angle_mae_degrees": torch.rad2deg(_mean(sums.angles_off, counts.angles)),
            "codebook_perplexity": perplexity(used),
            "codes_used": (used > 0).sum(),
        }
        return {name: float(score) for name, score in scores.items()}

    def gauges(self, model: nn.Module, phase: Phase) -> dict[str, float]:
        """Perplexity of the codes' running usage, commitment cost and the weights of the losses."""
        network = _network(model)
        step = int(network.steps_done)
        weights = {f"weight_{name}": weight for name, weight in self.weights.at(step).items()}
        usage = float(perplexity(network.quantizer.usage()))
        return {"codebook_perplexity": usage, "commitment": value(self.commitment, step), **weights}

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"encoder": ("encoder.*",), "decoders": ("decoders.*",)}

    def param_groups(self, model: nn.Module, phase: Phase) -> list[dict[str, Any]] | None:
        """Matrices of the bodies, for Muon; everything else, for AdamW."""
        bodies = [name for name, kind in (("encoder", self.encoder), ("decoders", self.decoders)) if "muon" in kind]
        if not bodies:
            return None
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                in_body = name.split(".")[0] in bodies and ".body." in name and parameter.ndim == 2
                (matrices if in_body else others).append(parameter)
        return [
            {"params": matrices, "name": "body", "use_muon": True},
            {"params": others, "name": "rest", "use_muon": False},
        ]

    def evaluate(self, run: Run, sources: list[str]) -> dict[str, Any]:
        from gdyn.engines.monodecoder.report import evaluate  # matplotlib is not needed to train

        return evaluate(run, sources)

    def evaluation_lines(self, result: dict[str, Any]) -> list[str]:
        from gdyn.engines.monodecoder.report import evaluation_lines

        return evaluation_lines(result)

    def report(self, run: Run, **options: Any) -> dict[str, Any]:
        from gdyn.engines.monodecoder.report import report

        return report(run, **options)

    def report_lines(self, summary: dict[str, Any]) -> list[str]:
        from gdyn.engines.monodecoder.report import report_lines

        return report_lines(summary)

    def encode(self, run: Run, inputs: list[Path], output: Path, here: RankContext, **options: Any) -> list[str]:
        from gdyn.engines.monodecoder.encode import encode, encode_lines

        return encode_lines(encode(run, inputs, output, here, **options))

    def headline(self, summary: dict[str, Any]) -> list[str]:
        split = "test" if "test" in summary else "validation"
        scores = summary[split]
        return [
            f"{split} amino acids  {scores['aa_accuracy']:.1%} right, cross-entropy {scores['aa']:.4f} nats",
            f"{split} structure    {scores['ss_accuracy']:.1%} of secondary structure right, angles off by "
            f"{scores['angle_mae_degrees']:.1f}°",
            f"{split} alphabet     {scores['codes_used']:.0f} of {self.codes} letters used, perplexity "
            f"{scores['codebook_perplexity']:.1f}",
        ]


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts or shares (K,): how many letters would be used if all were used alike."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """0 where there is nothing."""
    return total / count.clamp(min=1)


def _network(model: nn.Module) -> Autoencoder:
    """DeepSpeed's engine has names of its own, which the network's must not meet."""
    return cast(Autoencoder, getattr(model, "module", model))
