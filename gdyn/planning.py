"""What more nodes would cost: a short run's measured windows and a stated model of communication. Standard library.

The model of a window (one optimizer step) on N nodes of r ranks, in seconds:

    window        = compute + communication(N, r)           nothing overlaps
    compute       = measured median - communication at the measured size
    communication = talk(N, bandwidth of a node) + talk(r, bandwidth within a node)
    talk(n, B)    = passes * ((n - 1)/n * bytes / B + hops * latency) + 4 small all-reduces of 2 * hops * latency
    hops          = ceil(log2 n)

A pass is a reduce-scatter or an all-gather of the gradient; an all-reduce is two of them and moves 2 (n-1)/n of its
bytes, which no algorithm can undercut (Patarasu and Yuan 2009, J. Parallel Distrib. Comput. 69, 117). Recursive halving
and doubling reaches that with 2 log2 n messages (Rabenseifner's algorithm, in Thakur, Rabenseifner and Gropp 2005, Int.
J. High Perform. Comput. Appl. 19, 49). It is hierarchical: between nodes every rank reduces its r-th part, so a node's
adapters carry the gradient once.

Passes: 2 without ZeRO. The ZeRO paper (Rajbhandari et al. 2020, section 7) has 2 at stages 1 and 2, and 3 at stage 3.
DeepSpeed 0.19.8 all-reduces at stages 1 and 2 where the paper reduce-scatters, and from stage 2 on it reduces in every
micro-batch: 3 at stage 1, 2 a + 1 at stage 2, for a micro-batches. Stage 3 is taken as 3 a, too much for parameters
below stage3_param_persistence_threshold, which stay whole.

Not in the model: waiting for the slowest rank, other jobs on the network, reading data, validation, checkpoints.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gdyn.errors import MissingFile, UserError
from gdyn.rundir import RunDir, read_json, read_metrics

LEAST_LINES = 5
"""Of train lines that count, so that a median and its spread mean something."""
LEAST_WINDOWS = 10
"""Per epoch; with fewer an epoch is a handful of steps, and the learning rate that was tuned no longer fits."""
SMALL_ALL_REDUCES = 4
"""Of a window, a few bytes each: batch statistics forward and backward, and the ranks' two agreements."""
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True)
class Network:
    """What the model needs to know of the machine."""

    gigabytes_per_second_per_node: float
    """All adapters of a node together, one direction, 10^9 bytes."""
    latency_microseconds: float
    """Of one small message between nodes."""
    source: str
    """Where the numbers are from, for the table: "nominal, 4 x 200 Gb/s", "measured by preflight on 2 nodes"."""
    gigabytes_per_second_within_node: float | None = None
    """Between the ranks of one node. None: not known, and counted only as far as the measurement contains it."""

    @classmethod
    def measured(cls, folder: Path) -> Network:
        """From the preflight.json of a job's run folder: medians over its links.

        Raises: MissingFile, UserError if the job had one node only.
        """
        path = RunDir(folder).preflight_json
        links = read_json(path)["links"]
        between = [link for link in links if link["nodes"][0] != link["nodes"][1]]
        within = [link["gb_s"] for link in links if link["nodes"][0] == link["nodes"][1]]
        if not between:
            raise UserError(f"{path} is of a job on one node, and knows nothing about the network between nodes.")
        return cls(
            gigabytes_per_second_per_node=statistics.median(link["gb_s"] * link["rank_pairs"] for link in between),
            latency_microseconds=1e6 * statistics.median(link["latency_s"] for link in between),
            source=f"medians of {len(between)} links that preflight measured",
            gigabytes_per_second_within_node=statistics.median(within) if within else None,
        )


@dataclass(frozen=True)
class Measurement:
    """What a short run says about one window."""

    run_dir: Path
    seconds: float
    """Median over the train lines of metrics.jsonl that count."""
    quartiles: tuple[float, float]
    lines: int
    ranks: int
    nodes: int
    micro_batch: int
    accumulation: int
    parameters: int
    """Trained ones: what is communicated."""
    bytes_per_parameter: int
    zero_stage: int
    samples: int | None
    """Of the training set; None: the run did not note it."""
    samples_per_window: float | None = None
    """Mean over an epoch, where the sizes of samples bound the micro-batches; None: micro-batches are full."""

    @property
    def share(self) -> float:
        """Samples of a window per rank."""
        if self.samples_per_window is not None:
            return self.samples_per_window / self.ranks
        return self.micro_batch * self.accumulation

    @property
    def global_batch(self) -> int:
        return round(self.share * self.ranks)

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @property
    def passes(self) -> int:
        """Reduce-scatters and all-gathers of the whole gradient in a window."""
        return {0: 2, 1: 3, 2: 2 * self.accumulation + 1, 3: 3 * self.accumulation}[self.zero_stage]

    @classmethod
    def read(cls, folder: Path) -> Measurement:
        """From the run folder of a short run on the machine that is planned for.

        Raises: UserError naming what is missing: too few windows, no checkpoint, starts of different sizes.
        """
        run_dir = RunDir(folder).existing()
        ranks, nodes, start = _size(run_dir)
        ds_json = _needed(run_dir.deepspeed_json)
        micro_batch = int(ds_json["train_micro_batch_size_per_gpu"])
        accumulation = int(ds_json.get("gradient_accumulation_steps", 1))
        full = micro_batch * accumulation * ranks
        samples_per_window = start.get("samples_per_window", full)
        seconds = _seconds_per_window(run_dir, samples_per_window)
        low, _, high = statistics.quantiles(seconds, n=4)
        return cls(
            run_dir=run_dir.path,
            seconds=statistics.median(seconds),
            quartiles=(low, high),
            lines=len(seconds),
            ranks=ranks,
            nodes=nodes,
            micro_batch=micro_batch,
            accumulation=accumulation,
            parameters=_trained_parameters(run_dir),
            bytes_per_parameter=_bytes_per_parameter(ds_json),
            zero_stage=int(ds_json.get("zero_optimization", {}).get("stage", 0)),
            samples=start.get("samples"),
            samples_per_window=samples_per_window if samples_per_window != full else None,
        )


@dataclass(frozen=True)
class Row:
    """The plan for one number of nodes. All modelled, but the seconds of a row that `measured`."""

    nodes: int
    ranks: int
    global_batch: int
    seconds_per_window: float
    communication: float
    """Of seconds_per_window, what the model says is communication."""
    windows_per_epoch: int
    throughput: float
    """Samples per second and rank."""
    efficiency: float
    """Throughput over that of one node."""
    measured: bool
    remark: str
    """What is wrong with training at this size, empty if nothing is."""

    @property
    def epoch_seconds(self) -> float:
        return self.windows_per_epoch * self.seconds_per_window

    @property
    def node_hours(self) -> float:
        """Of one epoch."""
        return self.nodes * self.epoch_seconds / 3600


def plan(
    measurement: Measurement,
    network: Network,
    ranks_per_node: int,
    nodes: int,
    samples: int,
    scaling: Scaling = "weak",
) -> list[Row]:
    """One row for 1, 2, 4 ... nodes, for `nodes`, and for as many as were measured.

    weak: a rank's share of a window stays what it was, so the global batch grows with the ranks. strong: the global
    batch stays; compute is taken to shrink with a rank's share, which flatters small shares. `samples`: of the
    training set.

    Raises: UserError for numbers below 1, or a network whose modelled communication exceeds what was measured.
    """
    for name, value in {"nodes": nodes, "ranks_per_node": ranks_per_node, "samples": samples}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more.")
    compute = _compute(measurement, network)
    sizes = sorted({2**i for i in range(nodes.bit_length())} | {nodes, min(measurement.nodes, nodes)})
    rows: list[Row] = []
    for n in sizes:
        ranks = n * ranks_per_node
        batch = measurement.global_batch if scaling == "strong" else round(measurement.share * ranks)
        talk = communication(measurement, network, n, ranks_per_node)
        seconds = compute * batch / ranks / measurement.share + talk
        throughput = batch / seconds / ranks
        rows.append(
            Row(
                nodes=n,
                ranks=ranks,
                global_batch=batch,
                seconds_per_window=seconds,
                communication=talk,
                windows_per_epoch=samples // batch,
                throughput=throughput,
                efficiency=throughput / (rows[0].throughput if rows else throughput),
                measured=(n, ranks_per_node) == (measurement.nodes, measurement.ranks_per_node),
                remark=_remark(batch, ranks, samples),
            )
        )
    return rows


def _compute(measurement: Measurement, network: Network) -> float:
    """Seconds of a measured window that are not communication."""
    if not network.gigabytes_per_second_per_node > 0 or network.latency_microseconds < 0:
        raise UserError(f"{network}: expected a bandwidth above 0 and a latency of 0 or more.")
    modelled = communication(measurement, network, measurement.nodes, measurement.ranks_per_node)
    if modelled >= measurement.seconds:
        raise UserError(
            f"{measurement.run_dir}: a window took {measurement.seconds:.3g} s, but the model says {modelled:.3g} s "
            f"for its communication alone; this network ({network.source}) is slower than the one that was measured."
        )
    return measurement.seconds - modelled


def communication(measurement: Measurement, network: Network, nodes: int, ranks_per_node: int) -> float:
    """Modelled seconds of a window, on `nodes` nodes of `ranks_per_node` ranks."""
    gigabytes = measurement.parameters * measurement.bytes_per_parameter / 1e9
    latency = network.latency_microseconds / 1e6

    def over(n: int, bandwidth: float) -> float:
        hops = math.ceil(math.log2(n))
        one = (n - 1) / n * gigabytes / bandwidth + hops * latency
        return measurement.passes * one + SMALL_ALL_REDUCES * 2 * hops * latency

    within = network.gigabytes_per_second_within_node
    between = over(nodes, network.gigabytes_per_second_per_node)
    return between + (over(ranks_per_node, within) if within else 0.0)


def table(rows: Sequence[Row], measurement: Measurement, network: Network) -> str:
    """The plan for people: what was measured, what is modelled, and what is neither."""
    m, (low, high) = measurement, measurement.quartiles
    ranks_per_node = rows[0].ranks // rows[0].nodes
    lines = [
        f"measured  {m.seconds:.4g} s per window (quartiles {low:.4g} to {high:.4g}, {m.lines} lines of metrics.jsonl)",
        f"          at ranks {m.ranks}, nodes {m.nodes}, global batch {m.global_batch}: {m.run_dir}",
        f"modelled  everything else, from {m.passes} passes of {m.parameters:,} parameters x {m.bytes_per_parameter} "
        f"bytes (ZeRO stage {m.zero_stage}),",
        f"          {network.gigabytes_per_second_per_node:g} GB/s per node and {network.latency_microseconds:g} us, "
        f"{network.source}.",
        "          Nothing overlaps. Not counted: waiting for the slowest rank, validation, checkpoints.",
    ]
    if ranks_per_node != m.ranks_per_node:
        talk = "modelled" if network.gigabytes_per_second_within_node else "not counted"
        lines += [
            f"          Ranks per node: measured {m.ranks_per_node}, planned {ranks_per_node}. What the ranks of a",
            f"          node share is not in the numbers; their communication is {talk}.",
        ]
    head = "nodes,ranks,batch,s/window,communication,windows/epoch,epoch,node-h/epoch,efficiency".split(",")
    cells = [[*head, ""]]
    for row in rows:
        cells.append(
            [
                *(str(row.nodes), str(row.ranks), str(row.global_batch)),
                *(f"{row.seconds_per_window:.4g}", f"{row.communication:.2g}", str(row.windows_per_epoch)),
                *((_duration(row.epoch_seconds), f"{row.node_hours:.3g}") if row.windows_per_epoch else ("-", "-")),
                *(f"{100 * row.efficiency:.0f} %", "; ".join(filter(None, ["measured" * row.measured, row.remark]))),
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
    for *numbers, remark in cells:
        text = "  ".join(number.rjust(width) for number, width in zip(numbers, widths, strict=True))
        lines.append(f"{text}  {remark}".rstrip())
    return "\n".join(lines)


def _remark(batch: int, ranks: int, samples: int) -> str:
    if batch > samples:
        return f"the batch exceeds the {samples} samples"
    if batch < ranks:
        return "fewer samples in a batch than ranks"
    if batch % ranks:
        return "the batch does not divide by the ranks"
    if samples // batch < LEAST_WINDOWS:
        return f"fewer than {LEAST_WINDOWS} steps per epoch"
    return ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, secs = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{secs:02d}"


def _needed(path: Path) -> Any:
    try:
        return read_json(path)
    except MissingFile:
        raise MissingFile(f"{path} does not exist; a plan needs a run that `gdyn train` started.") from None


def _size(run_dir: RunDir) -> tuple[int, int, dict[str, Any]]:
    """(ranks, nodes) of all starts, as lines of metrics do not say which start wrote them, and the last start."""
    starts = _needed(run_dir.provenance_json)
    sizes = {(int(start["world_size"]), int(start.get("nodes", 1))) for start in starts}
    found = ", ".join(f"{ranks} ranks on {nodes} nodes" for ranks, nodes in sorted(sizes))
    if len(sizes) != 1:
        raise UserError(f"{run_dir.path} was started on {found or 'nothing'}; a plan needs a run of one size.")
    [(ranks, nodes)] = sizes
    if ranks % nodes:
        raise UserError(f"{run_dir.path} ran on {found}; a plan needs the same number of ranks on every node.")
    return ranks, nodes, starts[-1]


def _seconds_per_window(run_dir: RunDir, global_batch: float) -> list[float]:
    """One value per train line. The first line of a phase is left out: it also counts compilation and warm-up."""
    seconds, phase = [], None
    for line in read_metrics(run_dir.metrics_jsonl):
        if line["split"] == "train":
            if line["phase"] == phase:
                seconds.append(global_batch / line["samples_per_second"])
            phase = line["phase"]
    if len(seconds) < LEAST_LINES:
        raise UserError(
            f"{run_dir.metrics_jsonl} has {len(seconds)} train lines after the first of each phase, {LEAST_LINES} are "
            "needed; train for longer, or with a smaller logging.every_steps."
        )
    return seconds


def _trained_parameters(run_dir: RunDir) -> int:
    """Of the newest checkpoint, from the header of its weights (safetensors: 8 bytes of length, then JSON)."""
    latest = run_dir.checkpoints / "latest"
    if not latest.is_file():
        raise MissingFile(f"{latest} does not exist; a plan needs a run with a checkpoint, so let one epoch end.")
    folder = run_dir.checkpoints / latest.read_text().strip()
    try:
        with (folder / "weights.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'weights.safetensors'} cannot be read ({error}).") from None
    trained = set(_needed(folder / "position.json").get("trains", header))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name in trained and "shape" in entry)


def _bytes_per_parameter(ds_json: dict[str, Any]) -> int:
    """What DeepSpeed communicates: communication_data_type, else the precision's own."""
    precisions = [name for name in ("fp16", "bf16") if ds_json.get(name, {}).get("enabled") is True]
    return BYTES[ds_json.get("communication_data_type") or [*precisions, "fp32"][0]]
