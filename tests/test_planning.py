"""A plan is the measurement where it was measured, and a closed form elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdyn import planning
from gdyn.config import RunConfig
from gdyn.errors import UserError
from gdyn.phases import Phase
from gdyn.planning import Measurement, Network, plan, table
from gdyn.ranks import RankContext
from gdyn.rundir import write_json
from gdyn.trainer import Trainer
from tests import runs

MEASURED = Measurement(
    run_dir=Path("short"),
    seconds=0.5,
    quartiles=(0.4, 0.6),
    lines=20,
    ranks=8,
    nodes=1,
    micro_batch=16,
    accumulation=2,
    parameters=1_000_000,
    bytes_per_parameter=4,
    zero_stage=0,
    samples=1_000_000,
)
SLINGSHOT = Network(100.0, 2.0, "nominal, 4 x 200 Gb/s")
IDEAL = Network(math.inf, 0.0, "ideal")


def test_row_of_the_measured_size_is_the_measurement() -> None:
    for nodes in (1, 4):
        measured = replace(MEASURED, ranks=8 * nodes, nodes=nodes)
        [row] = [row for row in plan(measured, SLINGSHOT, 8, 16, 1_000_000) if row.measured]
        assert (row.nodes, row.global_batch) == (nodes, measured.global_batch)
        assert row.seconds_per_window == pytest.approx(0.5, rel=1e-12)


def test_on_an_ideal_network_nothing_is_lost() -> None:
    rows = plan(MEASURED, IDEAL, 8, 1000, 1_000_000)
    assert [row.nodes for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert all(row.efficiency == 1 and row.seconds_per_window == 0.5 for row in rows)


def test_all_reduce_between_nodes_is_the_closed_form() -> None:
    bandwidth_only = replace(SLINGSHOT, latency_microseconds=0.0)
    for nodes in (2, 3, 64):
        expected = 2 * (nodes - 1) / nodes * 4e6 / 100e9
        assert planning.communication(MEASURED, bandwidth_only, nodes, 8) == pytest.approx(expected, rel=1e-12)
    # Two trees of messages for the gradient and two for each of four small sums; 1,000 nodes are 10 hops.
    latency_only = replace(SLINGSHOT, gigabytes_per_second_per_node=math.inf)
    assert planning.communication(MEASURED, latency_only, 1000, 8) == pytest.approx((2 + 8) * 10 * 2e-6, rel=1e-12)


def test_twice_the_bytes_double_the_bandwidth_term() -> None:
    network = replace(SLINGSHOT, latency_microseconds=0.0)
    once, twice = (
        planning.communication(m, network, 16, 8) for m in (MEASURED, replace(MEASURED, parameters=2_000_000))
    )
    assert twice == pytest.approx(2 * once, rel=1e-12)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 5), (3, 6)])
def test_zero_stages_communicate_what_deepspeed_does_in_two_micro_batches(stage: int, passes: int) -> None:
    network = replace(SLINGSHOT, latency_microseconds=0.0)
    plain = planning.communication(MEASURED, network, 16, 8)
    staged = planning.communication(replace(MEASURED, zero_stage=stage), network, 16, 8)
    assert staged == pytest.approx(plain * passes / 2, rel=1e-12)


class CountingCollectives(TorchDispatchMode):
    """Elements that torch.distributed's collectives move, in passes: an all-reduce is a reduce-scatter and an
    all-gather."""

    PASSES: ClassVar = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            elements = max(tensor.numel() for tensor in tensors)
            self.elements += self.PASSES[func._schema.name.removeprefix("c10d::")] * elements
        return func(*args, **(kwargs or {}))


class CountingTrainer(Trainer):
    moved = 0

    def _train_window(self, *args: Any) -> float | None:
        with CountingCollectives() as count:
            norm = super()._train_window(*args)
        self.moved = count.elements
        return norm


def parameters_moved(here: RankContext, config: RunConfig) -> float:
    """Passes of a window, over all parameters, the few statistics included."""
    trainer = runs.train(here, config, kind=CountingTrainer)
    return trainer.moved / sum(p.numel() for p in trainer.engine.model().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_passes_are_what_deepspeed_moves(stage: int, run_ranks: Any, tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run", stage=stage, split=(2, 2), phases=[Phase("vamp2", 1)])
    modelled = replace(MEASURED, zero_stage=stage).passes
    for moved in run_ranks(2, parameters_moved, config):
        if stage < 3:
            assert moved == pytest.approx(modelled, rel=0.02)
        else:  # parameters this small stay whole
            assert moved < modelled


def test_within_a_node_counts_only_what_the_measurement_does_not_contain() -> None:
    within = replace(SLINGSHOT, gigabytes_per_second_within_node=50.0, latency_microseconds=0.0)
    [same, *_] = plan(MEASURED, within, 8, 1, 1_000_000)
    assert same.seconds_per_window == pytest.approx(0.5)
    one_rank = replace(MEASURED, ranks=1)
    [row] = plan(one_rank, within, 8, 1, 1_000_000)
    assert row.seconds_per_window == pytest.approx(0.5 + 2 * 7 / 8 * 4e6 / 50e9, rel=1e-12)
    assert "their communication is modelled" in table([row], one_rank, within)
    assert "their communication is not counted" in table([row], one_rank, SLINGSHOT)


def test_weak_scaling_grows_the_batch_and_strong_scaling_divides_the_work() -> None:
    weak, strong = (plan(MEASURED, IDEAL, 8, 4, 100_000, scaling)[-1] for scaling in ("weak", "strong"))
    assert (weak.global_batch, weak.windows_per_epoch, weak.epoch_seconds) == (1024, 97, 97 * 0.5)
    assert (strong.global_batch, strong.windows_per_epoch, strong.epoch_seconds) == (256, 390, 390 * 0.125)
    assert strong.node_hours == pytest.approx(4 * 390 * 0.125 / 3600)


def test_strong_scaling_loses_to_communication_what_amdahl_says() -> None:
    rows = plan(MEASURED, SLINGSHOT, 8, 16, 100_000, "strong")
    talk = planning.communication(MEASURED, SLINGSHOT, 16, 8)
    assert rows[-1].efficiency == pytest.approx((0.5 / 16) / (0.5 / 16 + talk), rel=1e-12)


def test_batch_that_outgrows_the_data_is_marked() -> None:
    remarks = {row.nodes: row.remark for row in plan(MEASURED, IDEAL, 8, 16, 3000)}
    assert remarks[1] == ""
    assert remarks[2] == "fewer than 10 steps per epoch"
    assert remarks[16] == "the batch exceeds the 3000 samples"
    strong = {row.nodes: row.remark for row in plan(MEASURED, IDEAL, 8, 64, 100_000, "strong")}
    assert strong[32] == ""
    assert strong[64] == "fewer samples in a batch than ranks"
    assert plan(MEASURED, IDEAL, 8, 3, 100_000, "strong")[-1].remark == "the batch does not divide by the ranks"


def test_table_says_what_is_measured_and_what_is_modelled() -> None:
    text = table(plan(MEASURED, SLINGSHOT, 8, 4, 3000), MEASURED, SLINGSHOT)
    assert "measured  0.5 s per window" in text
    assert "100 GB/s per node and 2 us, nominal, 4 x 200 Gb/s" in text
    rows = text.splitlines()[-3:]
    assert rows[0].endswith("100 %  measured")
    assert [row.split()[0] for row in rows] == ["1", "2", "4"]


def test_network_that_is_slower_than_the_measurement_is_refused() -> None:
    measured = replace(MEASURED, ranks=16, nodes=2)
    with pytest.raises(UserError, match=r"a window took 0\.5 s, but the model says 4 s"):
        plan(measured, Network(0.001, 0.0, "modem"), 8, 4, 1000)
    with pytest.raises(UserError, match="nodes is 0"):
        plan(MEASURED, SLINGSHOT, 8, 0, 1000)


# Reading a run


def test_network_of_a_preflight_is_its_median_link(tmp_path: Path) -> None:
    inside = [{"nodes": [name, name], "gb_s": 40.0, "latency_s": 1e-6, "rank_pairs": 4} for name in "abc"]
    rates = {"ab": 12.0, "bc": 11.0, "ca": 3.0}
    links = [{"nodes": list(p), "gb_s": rate, "latency_s": 3e-6, "rank_pairs": 8} for p, rate in rates.items()]
    write_json(tmp_path / "preflight.json", {"links": inside + links})
    network = Network.measured(tmp_path)
    assert network == Network(88.0, pytest.approx(3.0), "medians of 3 links that preflight measured", 40.0)
    write_json(tmp_path / "preflight.json", {"links": inside[:1]})
    with pytest.raises(UserError, match="one node"):
        Network.measured(tmp_path)


def finished_run(here: RankContext, folder: Path, **changes: object) -> tuple[Path, int]:
    """(folder of a real run with what launch/train.py adds to it, trained parameters)."""
    trainer = runs.train(here, runs.small_run(folder, "run", **changes))
    run_dir = trainer.run_dir
    write_json(run_dir.deepspeed_json, trainer.ds_json)
    run_dir.begin_start({"world_size": 1, "nodes": 1, "samples": len(trainer.datasets["train"])})
    return run_dir.path, sum(p.numel() for p in trainer.engine.model().parameters())


def test_short_run_becomes_a_plan(run_ranks, tmp_path: Path) -> None:
    [(run, parameters)] = run_ranks(1, finished_run, tmp_path)
    measured = Measurement.read(run)
    assert (measured.ranks, measured.nodes, measured.global_batch, measured.zero_stage) == (1, 1, 48, 0)
    assert (measured.parameters, measured.bytes_per_parameter) == (parameters, 4)
    assert measured.samples == 198  # 200 frames at a lag of 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    counted = sorted(48 / rate for i, rate in enumerate(rates) if i not in (0, 8))  # the first of each phase
    assert measured.lines == len(counted) == 14
    assert measured.seconds == pytest.approx((counted[6] + counted[7]) / 2)
    [row, *_] = plan(measured, SLINGSHOT, 1, 4, 198)
    assert row.measured and row.seconds_per_window == measured.seconds and row.windows_per_epoch == 4

    # Windows that the sizes of their samples keep smaller.
    write_json(run / "provenance.json", [{"world_size": 1, "nodes": 1, "samples_per_window": 12.4}])
    smaller = Measurement.read(run)
    assert smaller.seconds == pytest.approx(measured.seconds * 12.4 / 48) and smaller.global_batch == 12
    assert [row.global_batch for row in plan(smaller, SLINGSHOT, 1, 4, 198)] == [12, 25, 50]

    write_json(run / "provenance.json", [{"world_size": 1}, {"world_size": 4, "nodes": 2}])
    with pytest.raises(UserError, match="1 ranks on 1 nodes, 4 ranks on 2 nodes"):
        Measurement.read(run)
    write_json(run / "provenance.json", [{"world_size": 1}])
    short = [line for line in lines if line["split"] == "train"][:5]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    with pytest.raises(UserError, match="has 4 train lines after the first of each phase, 5 are needed"):
        Measurement.read(run)


@pytest.mark.parametrize("missing", ["deepspeed.json", "provenance.json", "checkpoints/latest"])
def test_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.yaml").touch()
    write_json(tmp_path / "deepspeed.json", {"train_micro_batch_size_per_gpu": 1})
    write_json(tmp_path / "provenance.json", [{"world_size": 1}])
    line = {"split": "train", "phase": "a", "samples_per_second": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(9)))
    (tmp_path / missing).unlink(missing_ok=True)
    with pytest.raises(UserError, match=missing):
        Measurement.read(tmp_path)
