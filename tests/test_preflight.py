"""Preflight measures the job with its own data and model, blames the right node, and training does not notice."""

import dataclasses
import gc
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gdyn import collectives, ds_config, preflight, rundir
from gdyn.config import Optimization
from gdyn.engines.monodecoder.engine import Monodecoder
from gdyn.engines.vamp.engine import Vamp
from gdyn.engines.vamp.frames import FramePairs
from gdyn.errors import UserError
from gdyn.phases import Phase
from gdyn.preflight import bandwidth, facts, memory, storage, table
from gdyn.preflight.bandwidth import Fabric, Layout, Link
from gdyn.preflight.facts import Report
from gdyn.preflight.judge import Demand, Finding, judge
from gdyn.preflight.limits import MIB, Limits
from gdyn.preflight.memory import ModelStates, Trial
from gdyn.ranks import ALONE, AgreedError, RankContext
from gdyn.recipes import bundled
from gdyn.rundir import RunDir
from gdyn.trainer import Trainer
from tests import harness, runs
from tests.harness import RanksFailed

LIMITS = Limits()
QUICK = Limits(link_seconds=0.2, write_bytes=MIB, min_bandwidth=1e-9, slow_share=0)
"""Measures as always, but does not judge links: the ranks of a test share a few cores."""
JUDGED = Limits(link_seconds=0.1)


def trainer(here: RankContext, config: Any) -> Trainer:
    """Before its first step. Every rank must call this."""
    run_dir = RunDir(Path(config.run_dir))
    if here.main:
        run_dir.create()
    here.barrier()
    return Trainer(config, here, run_dir, ds_config.read(config.deepspeed), runs.StopAfter(None))


def on_nodes_of(ranks: int, here: RankContext) -> RankContext:
    """`here` as if every `ranks` ranks had a node of their own."""
    return dataclasses.replace(here, node=f"node{here.rank // ranks}")


def written(config: Any) -> dict[str, Any]:
    return dict(json.loads(RunDir(Path(config.run_dir)).preflight_json.read_text()))


# ---- the ring


@pytest.mark.parametrize("n", range(3, 10))
def test_every_node_has_two_links_and_one_per_round(n: int) -> None:
    rounds = bandwidth.ring([f"n{i}" for i in range(n)])
    ends = [name for pairs in rounds for pair in pairs for name in pair]
    assert sorted(ends) == sorted(2 * [f"n{i}" for i in range(n)])
    assert all(len(set(sum(pairs, ()))) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == 2 + n % 2


def test_two_nodes_have_one_link_and_one_node_has_none() -> None:
    assert bandwidth.ring(["a", "b"]) == [[("a", "b")]]
    assert bandwidth.ring(["a"]) == []


@pytest.mark.parametrize("names", ["aabbccdd", "abcdabcd", "aaabbccc"], ids=["block", "cyclic", "uneven"])
def test_partners_are_mutual_and_on_the_neighbouring_node(names: str) -> None:
    layout = Layout.of(names)
    for pairs in [[(name, name) for name in layout.nodes], *bandwidth.ring(layout.nodes)]:
        partners = layout.partners(pairs)
        assert all(partners[other] == one != other for one, other in partners.items())
        assert all(tuple(sorted({names[one], names[other]})) in allowed(pairs) for one, other in partners.items())


def allowed(pairs: list[tuple[str, str]]) -> set[tuple[str, ...]]:
    return {tuple(sorted(set(pair))) for pair in pairs}


# ---- who is to blame


def test_outlier_bound_is_half_the_median_or_five_scaled_deviations_below_it() -> None:
    rates = np.random.default_rng(0).normal(20, 0.5, 101)
    assert bandwidth.outlier_bound(list(rates), LIMITS) == pytest.approx(np.median(rates) / 2)
    wide = np.random.default_rng(0).normal(20, 2.5, 101)
    deviation = np.median(np.abs(wide - np.median(wide)))
    assert bandwidth.outlier_bound(list(wide), LIMITS) == pytest.approx(np.median(wide) - 5 * 1.4826 * deviation)
    assert bandwidth.outlier_bound([20.0, 20.0, 1.0], LIMITS) == 0.0


def simulated(n: int, bad: set[int], limits: Limits = LIMITS, usual: float = 20.0, cable: int | None = None) -> Fabric:
    """A fabric where a link is as fast as the slower of its nodes; `cable`: a bad link between it and the next node."""
    names = [f"n{i:04d}" for i in range(n)]
    speed = {name: (0.04 if i in bad else 1.0) * usual for i, name in enumerate(names)}
    jitter = np.random.default_rng(1)

    def link(a: str, b: str) -> Link:
        rate = min(speed[a], speed[b]) * jitter.uniform(0.95, 1.05)
        return Link((a, b), 0.1 if cable is not None and a == names[cable] else rate, 2e-5)

    rounds = bandwidth.ring(names)
    links = tuple(link(a, b) for pairs in rounds for a, b in pairs)
    again = tuple(link(a, b) for pairs in bandwidth.second_look(links, limits) for a, b in pairs)
    return Fabric(links, again)


ONE = [(n, {bad}) for n in (4, 5, 8, 1000) for bad in (0, 2, n - 1)]
TWO = [(n, bad) for n in (8, 1000) for bad in ({0, 1}, {0, 2}, {3, n - 1})]


@pytest.mark.parametrize(("n", "bad"), [(4, set()), (1000, set()), *ONE, *TWO], ids=str)
def test_exactly_the_bad_nodes_are_at_fault(n: int, bad: set[int]) -> None:
    assert bandwidth.at_fault(simulated(n, bad), LIMITS) == [f"n{i:04d}" for i in sorted(bad)]


def test_a_bad_cable_blames_neither_end() -> None:
    fabric = simulated(10, set(), cable=3)
    [finding] = judge([report(0)], fabric, DEMAND, LIMITS)
    assert "between n0003 and n0004" in finding.text
    assert not finding.fatal and not finding.blames


def test_of_two_slow_nodes_none_can_be_blamed_but_the_floor_refuses() -> None:
    fabric = simulated(2, {0}, usual=0.1)
    [finding] = judge([report(0)], fabric, DEMAND, LIMITS)
    assert finding.fatal and not finding.blames
    assert "0.01 GB/s" in finding.text


def test_of_three_nodes_the_one_below_the_floor_is_at_fault() -> None:
    assert bandwidth.at_fault(simulated(3, {1}, usual=0.1), LIMITS) == ["n0001"]


def test_a_fabric_that_is_slower_than_asked_for_is_nobodys_fault() -> None:
    limits = Limits(min_bandwidth=100)
    fabric = simulated(6, set(), limits)
    [finding] = judge([report(0)], fabric, DEMAND, limits)
    assert finding.fatal and not finding.blames
    assert "6 of 6 links have less than the least allowed, 100 GB/s" in finding.text


def test_a_node_that_is_slow_within_is_at_fault_if_it_is_so_twice() -> None:
    links = tuple(Link((name, name), 1.0 if name == "c" else 50.0, 1e-5) for name in "abcdef")
    assert bandwidth.second_look(links, LIMITS) == [[("c", "c")]]
    assert bandwidth.at_fault(Fabric(links, (Link(("c", "c"), 1.0, 1e-5),)), LIMITS) == ["c"]
    assert bandwidth.at_fault(Fabric(links, (Link(("c", "c"), 48.0, 1e-5),)), LIMITS) == []


def test_rank_pairs_of_two_nodes_make_one_link_whichever_rank_is_lower() -> None:
    layout = Layout.of("abba")
    links = bandwidth.join_links(layout, [layout.partners([("a", "b")])], [[(5.0, 1e-5)], *2 * [[(3.0, 2e-5)]], [None]])
    assert links == (Link(("a", "b"), 3.0, 2e-5, rank_pairs=2),)


def with_a_slow_node(here: RankContext, slow: int) -> list[str]:
    """Whom four real ranks, four nodes, blame; the rates are made up."""

    def talk(here: RankContext, layout: Layout, partner: int | None, limits: Limits) -> Any:
        here.barrier()
        return None if partner is None else (0.5 if slow in (here.rank, partner) else 20.0, 1e-5)

    bandwidth._talk = talk
    fabric = bandwidth.measure(here, Layout.of("abcd"), JUDGED)
    return bandwidth.at_fault(fabric, JUDGED)


@pytest.mark.parametrize("slow", range(4))
def test_the_second_look_of_real_ranks_finds_the_slow_node(run_ranks: Any, slow: int) -> None:
    assert run_ranks(4, with_a_slow_node, slow)[0] == ["abcd"[slow]]


# ---- findings

DEMAND = Demand(micro_batch=48, accumulation=1, zero_stage=0)


def report(rank: int, node: str = "", **facts: Any) -> Report:
    given = {"device": "GPU A", "versions": {"torch": "2.13"}, "host_free": 100 * 10**9, "host_total": 128 * 10**9}
    return Report(rank, node or f"n{rank}", **given | facts)


def findings(changed: dict[int, dict[str, Any]], ranks: int = 4, demand: Demand = DEMAND) -> list[Finding]:
    reports = [report(rank, **changed.get(rank, {})) for rank in range(ranks)]
    return judge(reports, Fabric(), demand, LIMITS)


def test_a_healthy_job_has_no_findings() -> None:
    assert findings({}) == []


def test_another_version_is_refused_and_the_few_nodes_that_have_it_are_blamed() -> None:
    [finding] = findings({2: {"versions": {"torch": "2.11"}}})
    assert "torch is 2.13 on most ranks, but 2.11 on n2" in finding.text
    assert finding.fatal and finding.blames and finding.nodes == ("n2",)
    [finding] = findings({1: {"versions": {"torch": "2.11"}}}, ranks=2)
    assert finding.fatal and not finding.blames


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"device": "GPU B"}, "GPU B on n3"),
        ({"driver": "550.1"}, "550.1 on n3"),
        ({"clock": (102.5, 103.5)}, "n3: +2.5 s"),
        ({"host_free": 10**9}, "n3 have less free host memory (1.0 GB)"),
    ],
)
def test_what_differs_between_nodes_is_a_warning_that_names_them(fact: dict[str, Any], said: str) -> None:
    clocks = {rank: {"clock": (100.0, 101.0)} for rank in range(4)}
    [finding] = findings(clocks | {3: clocks[3] | fact})
    assert said in finding.text
    assert not finding.fatal and finding.nodes == ("n3",)


def test_two_nodes_with_less_device_memory_are_named() -> None:
    memories = {rank: {"device_free": 70 * 10**9, "device_total": 80 * 10**9} for rank in range(6)}
    memories[1]["device_free"] = memories[4]["device_free"] = 40 * 10**9
    [finding] = findings(memories, ranks=6)
    assert finding.nodes == ("n1", "n4")


def test_one_preempted_rank_does_not_move_its_clock() -> None:
    marks = tuple(np.arange(5.0))
    late = (*marks[:4], marks[4] + 30)
    assert findings({0: {"clock": marks}, 1: {"clock": late}, 2: {"clock": marks}}, ranks=3) == []


def test_out_of_memory_is_refused_with_a_batch_that_fits() -> None:
    [finding] = findings({1: {"trial": Trial(out_of_memory="tried to allocate 3 GiB")}})
    assert "batch_size to 24 and double gradient_accumulation_steps to 2" in finding.text
    assert finding.fatal and finding.blames and finding.nodes == ("n1",)
    bounded = Demand(micro_batch=48, accumulation=1, zero_stage=0, size_key="engine.max_residues")
    [finding] = findings({1: {"trial": Trial(out_of_memory="tried to allocate 3 GiB")}}, demand=bounded)
    assert "Lower engine.max_residues" in finding.text
    everywhere = {rank: {"trial": Trial(out_of_memory="too much")} for rank in range(4)}
    [finding] = findings(everywhere)
    assert finding.fatal and not finding.blames


def test_weights_that_zero_would_shard_may_be_too_large_for_one_device() -> None:
    trial = Trial(out_of_memory="tried to allocate 3 GiB", weights=40 * 10**9)
    [finding] = findings({0: {"trial": trial}}, demand=dataclasses.replace(DEMAND, zero_stage=3))
    assert "ZeRO 3 may make room" in finding.text and not finding.fatal


def test_states_and_activations_that_do_not_fit_together_are_refused() -> None:
    states = ModelStates(parameters=10 * 10**9, gradients=10 * 10**9, optimizer=40 * 10**9)
    trial = Trial(loss=0.0, peak=50 * 10**9, weights=20 * 10**9)
    demand = dataclasses.replace(DEMAND, states=states)
    gpu = {"device_free": 80 * 10**9, "device_total": 80 * 10**9, "trial": trial}
    [finding] = findings(dict.fromkeys(range(4), gpu), demand=demand)
    assert "need 90 GB of a device, of which 80 GB are free" in finding.text and finding.fatal
    offloaded = dataclasses.replace(demand, states=dataclasses.replace(states, on_host=40 * 10**9))
    assert findings(dict.fromkeys(range(4), gpu), demand=offloaded) == []
    [finding] = judge([report(rank, "n0", **gpu) for rank in range(4)], Fabric(), offloaded, LIMITS)
    assert "need 160 GB of the node" in finding.text


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    [finding] = findings({rank: {"trial": Trial(loss=float("nan"))} for rank in range(4)})
    assert "NaN" in finding.text and finding.fatal and not finding.blames


@pytest.mark.parametrize(("failing", "blamed"), [({1}, True), ({0, 1, 2, 3}, False), ({1, 2, 3}, False)], ids=str)
def test_what_most_nodes_can_do_is_the_fault_of_those_that_cannot(failing: set[int], blamed: bool) -> None:
    # three of four: a run folder on rank 0's own disk
    [finding] = findings({rank: {"problems": {"write": "/runs/a cannot be written."}} for rank in failing})
    assert finding.text.endswith("/runs/a cannot be written.")
    assert finding.fatal and finding.blames == blamed


@pytest.mark.parametrize(("free", "fatal"), [(1.5, True), (5.0, False), (20.0, None)])
def test_disk_is_refused_without_room_for_one_checkpoint_and_warned_of_without_room_for_all(
    free: float, fatal: bool | None
) -> None:
    demand = dataclasses.replace(DEMAND, checkpoint_bytes=2 * 10**9, checkpoints=5, disk_free=int(free * 1e9))
    found = findings({}, demand=demand)
    assert [finding.fatal for finding in found] == ([] if fatal is None else [fatal])


def test_a_device_says_its_name_memory_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        mem_get_info=lambda which: (70, 80),
        get_device_name=lambda which: f"GPU at {which}",
        get_device_properties=lambda which: SimpleNamespace(driver_version="1.6"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda which: module)
    found = facts.device(torch.device("cuda:1"))
    assert found == {"device": "GPU at cuda:1", "device_free": 70, "device_total": 80, "driver": "1.6"}


# ---- the table


def test_table_of_a_thousand_nodes_lists_the_outlier_and_quantiles() -> None:
    fabric = simulated(1000, {500})
    reports = [report(rank, f"n{rank // 4:04d}") for rank in range(4000)]
    rows = table.rows(reports, fabric)
    lines = table.text(rows, fabric, ["n0500"], limit=32).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["node", "n0500"]
    rates = [link.gb_s for link in fabric.links]
    [middle] = [line for line in lines if line.startswith("median of 1000")]
    assert f"{np.median(rates):.3g}" in middle
    assert len(lines) == 1 + 1 + 4 + 1


def test_a_verdict_on_many_nodes_stays_short() -> None:
    nodes = tuple(f"n{i:03d}" for i in range(100))
    lines = str(preflight.Verdict(tuple(f"{node} is slow." for node in nodes), (), nodes)).splitlines()
    assert lines[1] == "n000 is slow." and len(lines) == 1 + 8 + 2
    assert lines[-2:] == [
        "... and 92 more, see preflight.json.",
        f"At fault: {', '.join(nodes[:8])} and 92 more; start again without.",
    ]


def test_table_of_a_few_nodes_has_a_row_each() -> None:
    rows = table.rows([report(rank) for rank in range(3)], Fabric())
    assert [row.node for row in rows] == ["n0", "n1", "n2"]
    assert len(table.text(rows, Fabric(), [], limit=32).splitlines()) == 4


# ---- memory and disk

HALF = {"bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}


@pytest.mark.parametrize("stage", range(4))
def test_model_states_are_those_of_the_zero_paper(stage: int) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 devices take 120, 31.4, 16.6 and 1.9 GB."""
    states = memory.model_states(HALF | {"zero_optimization": {"stage": stage}}, 7_500_000_000, 7_500_000_000, 64)
    assert states.total / 1e9 == pytest.approx([120, 31.4, 16.6, 1.9][stage], rel=0.02)


def test_offloaded_states_are_on_the_host() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    states = memory.model_states(HALF | {"zero_optimization": zero}, 800, 800, 8)
    assert (states.on_device, states.on_host) == (200, 200 + 1200)


@pytest.mark.parametrize("stage", range(4))
def test_checkpoint_is_as_large_as_foreseen(run_ranks: Any, tmp_path: Path, stage: int) -> None:
    config = large_run(tmp_path, "run", stage=stage)
    run_ranks(2, runs.run, config)
    found = sum(path.stat().st_size for path in runs.store(config).whole()[0].path.rglob("*"))
    model = config.engine.model()
    count = sum(parameter.numel() for parameter in model.parameters())
    values = ds_config.complete(ds_config.read(config.deepspeed), config.optimization, 1)
    assert found == pytest.approx(memory.checkpoint_bytes(values, count, count), rel=0.1)


def large_run(folder: Path, name: str, **changes: Any) -> Any:
    """One epoch of a network whose weights outweigh the files' headers."""
    return runs.small_run(folder, name, split=(2, 1), atom_fea_len=256, phases=[Phase("vamp2", 1)], **changes)


def window_of(config: Any) -> list[dict[str, torch.Tensor]]:
    return storage.read_windows(trainer(ALONE, config).loader, 0, 0)[1]


def alone(here: RankContext, config: Any) -> Trial:
    return try_window(config)


def try_window(config: Any, engine: Any = None) -> Trial:
    values = ds_config.complete(ds_config.read(config.deepspeed), config.optimization, 100)
    return memory.try_window(engine or config.engine, window_of(config), config.plan.phases, values, ALONE)


def test_one_window_needs_more_memory_with_a_larger_batch(run_ranks: Any, tmp_path: Path) -> None:
    def trial(batch: int) -> Trial:
        step = Optimization(batch, 1, learning_rate=0.1)
        config = runs.small_run(tmp_path, "run", atom_fea_len=64, optimization=step)
        return run_ranks(1, alone, config)[0]  # a process that has no memory in reserve

    one, other = trial(16), trial(160)
    assert one.parameters == other.parameters and one.weights == other.weights == 8 * one.parameters
    assert np.isfinite([one.loss, other.loss]).all()
    # Of a layer's edges at least one feature tensor is kept: frames x atoms x neighbours x features, 4 bytes each.
    assert other.peak - one.peak > 2 * (160 - 16) * 6 * 4 * 64 * 4


@pytest.mark.parametrize("recipe", ["fp32_zero0", "bf16_zero1", "fp16_zero2"])
def test_one_window_leaves_no_tensor_and_no_random_number_is_drawn(tmp_path: Path, recipe: str) -> None:
    config = dataclasses.replace(runs.small_run(tmp_path, "run"), deepspeed=str(bundled()[recipe]))
    state = torch.random.get_rng_state()
    before = tensors()
    loss = try_window(config).loss
    assert np.isfinite(loss)
    assert tensors() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@dataclasses.dataclass(frozen=True)
class Greedy(Vamp):
    """Runs out of memory on the highest rank."""

    def loss(self, model: Any, batch: Any, phase: Any, window: Any) -> Any:
        if not torch.distributed.is_initialized() or rank() == torch.distributed.get_world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nAnd so on")
        return super().loss(model, batch, phase, window)


def rank() -> int:
    return torch.distributed.get_rank()


def faulty(config: Any, kind: type[Vamp]) -> Any:
    fields = {field.name: getattr(config.engine, field.name) for field in dataclasses.fields(config.engine)}
    return dataclasses.replace(config, engine=kind(**fields))


def test_out_of_memory_is_reported_and_other_errors_are_raised(tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run")
    trial = try_window(config, faulty(config, Greedy).engine)
    assert trial.out_of_memory == "CUDA out of memory. Tried to allocate 3.00 GiB."
    assert trial.parameters > 0

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    engine = faulty(config, Vamp).engine
    object.__setattr__(engine, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        try_window(config, engine)
    assert not collectives._alone


def test_an_allocation_the_cpu_refuses_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory._is_out_of_memory(caught.value)
    assert not memory._is_out_of_memory(RuntimeError("shapes do not match"))


# ---- storage


def test_what_is_written_is_gone_afterwards_and_measured_in_full(tmp_path: Path) -> None:
    rate = storage.write_file(tmp_path, seconds=60, nbytes=9 * MIB)
    assert rate.nbytes == 9 * MIB and rate.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path / 'file'} cannot be written"):
        storage.write_file(tmp_path / "file", 1, MIB)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_that_names_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        storage.write_file(tmp_path, 1, MIB)


def test_reading_counts_the_bytes_of_the_batches(tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run", workers=2)
    loader = trainer(ALONE, config).loader
    rate, first = storage.read_windows(loader, seconds=60, nbytes=1 << 40)
    windows = list(dataclasses.replace(loader, workers=0).windows(0))
    assert rate.nbytes == sum(tensor.nbytes for window in windows for batch in window for tensor in batch.values())
    assert all(torch.equal(first[0][name], tensor) for name, tensor in windows[0][0].items())


# ---- on real ranks


def healthy(here: RankContext, config: Any, ranks_per_node: int) -> preflight.Verdict:
    return preflight.check(trainer(on_nodes_of(ranks_per_node, here), config), QUICK)


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (4, 1)])
def test_a_healthy_job_may_go_and_its_report_is_complete(
    run_ranks: Any, tmp_path: Path, ranks: int, per_node: int
) -> None:
    config = runs.small_run(tmp_path, "run", split=(ranks, 1))
    verdicts = run_ranks(ranks, healthy, config, per_node)
    assert all(verdict == verdicts[0] and verdict.go and not verdict.blamed for verdict in verdicts)
    found = written(config)
    nodes = ranks // per_node
    assert found["verdict"] == "go" and found["world_size"] == ranks and found["blamed"] == []
    assert [row["node"] for row in found["nodes"]] == [f"node{i}" for i in range(nodes)]
    assert all(row["ranks"] == per_node and row["write_mb_s"] > 0 < row["window_gb"] for row in found["nodes"])
    assert len(found["links"]) == (nodes if per_node > 1 else 0) + (nodes if nodes > 2 else nodes - 1)
    assert all(link["gb_s"] > 0 < link["latency_s"] for link in [*found["links"], found["all_reduce"]])
    assert {path.name for path in Path(config.run_dir).iterdir()} == {"checkpoints", "preflight.json"}


def test_one_process_alone_can_be_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gdyn")
    config = runs.small_run(tmp_path, "run")
    assert preflight.check(trainer(ALONE, config), QUICK).go
    assert written(config)["all_reduce"] is None
    assert "preflight: go" in caplog.text and "write MB/s" in caplog.text


def refused(here: RankContext, config: Any, spoil: Callable[[RankContext], None]) -> str:
    """The message, on four ranks that are four nodes."""
    made = trainer(on_nodes_of(1, here), config)
    spoil(here)
    with pytest.raises(AgreedError) as caught:
        preflight.check(made, QUICK)
    return str(caught.value)


def nothing(here: RankContext) -> None:
    """Leaves the job as it is."""


def old_torch(here: RankContext) -> None:
    if here.rank == 3:
        versions = rundir.versions()
        facts.rundir.versions = lambda: versions | {"torch": "1.0"}


def lost_data(here: RankContext) -> None:
    if here.rank == 3:
        FramePairs.__getitem__ = stale


def stale(self: Any, indices: np.ndarray) -> Any:
    raise OSError(116, "Stale file handle")


def full_disk(here: RankContext) -> None:
    """Of rank 3: no file may grow beyond 64 kB there."""
    if here.rank == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        (Greedy, nothing, "Halve optimization.batch_size to 6"),
        (Vamp, old_torch, "but 1.0 on node3"),
        (Vamp, lost_data, "Stale file handle"),
        (Vamp, full_disk, "cannot be written (File too large)"),
    ],
    ids=["out_of_memory", "old_torch", "lost_data", "full_disk"],
)
def test_a_job_with_one_sick_node_is_refused_on_every_rank_and_the_node_blamed(
    run_ranks: Any, tmp_path: Path, kind: type[Vamp], spoil: Callable[[RankContext], None], said: str
) -> None:
    config = faulty(runs.small_run(tmp_path, "run", split=(4, 1)), kind)
    messages = run_ranks(4, refused, config, spoil)
    assert len(set(messages)) == 1
    assert said in messages[0] and "At fault: node3" in messages[0]
    found = written(config)
    assert found["verdict"] == "no go" and found["blamed"] == ["node3"] and len(found["refusals"]) == 1
    assert {path.name for path in Path(config.run_dir).iterdir()} == {"checkpoints", "preflight.json"}


def test_an_earlier_verdict_does_not_outlive_a_new_start(tmp_path: Path) -> None:
    config = runs.small_run(tmp_path, "run")
    run = trainer(ALONE, config)
    run.run_dir.preflight_json.write_text('{"blamed": ["node7"]}')
    run.loader.dataset.trajectories = None  # a bug
    with pytest.raises(TypeError):
        preflight.check(run, QUICK)
    assert not run.run_dir.preflight_json.exists()


def test_a_file_that_cannot_be_written_is_no_go(tmp_path: Path) -> None:
    run = trainer(ALONE, runs.small_run(tmp_path, "run"))
    run.run_dir.preflight_json.mkdir()
    with pytest.raises(AgreedError, match=r"preflight\.json cannot be written"):
        preflight.check(run, QUICK)


def silent_partner(here: RankContext) -> None:
    """Rank 1 does not answer."""
    if here.rank == 1:
        here.barrier()
        time.sleep(2)
    else:
        bandwidth._talk(here, Layout.of(["a", "b"]), 1, Limits(answer_seconds=0.5))


def test_a_lost_message_names_both_nodes(run_ranks: Any) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, silent_partner)
    assert "rank 0 on a and rank 1 on b lost a message of 4 bytes" in str(failed.value.errors[0])


class Checked(Trainer):
    """With a preflight before training."""

    def fit(self) -> Any:
        preflight.check(self, QUICK)
        return super().fit()


def checked_run(here: RankContext, config: Any) -> None:
    runs.train(here, config, kind=Checked)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        pytest.param(2, {"norm": "batch"}, marks=pytest.mark.slow),
        (2, {"engine": Monodecoder, "codes": 24, "revive_after": 1, "phases": [Phase("loss", 1)]}),
    ],
    ids=["one", "two, synchronised", "two, codes without gradients"],
)
def test_training_after_a_preflight_is_bit_for_bit_the_training_without(
    run_ranks: Any, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    plain, checked = (runs.small_run(tmp_path, name, split=(ranks, 2), **changes) for name in ("plain", "checked"))
    run_ranks(ranks, runs.run, plain)
    run_ranks(ranks, checked_run, checked)
    assert written(checked)["verdict"] == "go"
    assert runs.metrics(plain) == runs.metrics(checked)
    assert runs.summary(plain) == runs.summary(checked)
    weights = runs.weights(plain)
    assert all(torch.equal(weight, weights[name]) for name, weight in runs.weights(checked).items())


# ---- the program


def run_file(folder: Path, ranks: int) -> list[str]:
    config = runs.small_run(folder, "run", split=(ranks, 1))
    (folder / "run.yaml").write_text(config.to_yaml())
    return ["--config", str(folder / "run.yaml")]


def program(argv: list[str]) -> int:
    from launch import preflight as program

    return program.main(argv)


def test_a_floor_out_of_reach_is_exit_code_2_on_every_rank(run_ranks: Any, tmp_path: Path) -> None:
    argv = run_file(tmp_path, 2)
    assert run_ranks(2, program, [*argv, "--min_bandwidth", "1000000"], join=False) == [2, 2]
    found = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert "1e+06 GB/s" in found["refusals"][0] and found["blamed"] == []


@pytest.mark.parametrize("words", [["--min_bandwidth", "fast"], ["--min_bandwidth=-1"], ["--min_bandwith", "3"]])
def test_options_that_are_not_understood_are_exit_code_2(run_ranks: Any, tmp_path: Path, words: list[str]) -> None:
    assert run_ranks(2, program, [*run_file(tmp_path, 2), *words], join=False) == [2, 2]


def test_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program(["--help"])
    assert "--min_bandwidth" in capsys.readouterr().out


MPICH = find_spec("mpi4py") is None or not Path(sys.executable).with_name("mpiexec").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [
        (1, [sys.executable]),
        (2, ["torchrun", "--standalone", "--nproc_per_node", "2"]),
        pytest.param(
            2,
            ["mpiexec", "-n", "2", sys.executable],
            marks=pytest.mark.skipif(MPICH, reason="pip install mpi4py mpich"),
        ),
    ],
    ids=["python", "torchrun", "mpich"],
)
def test_every_launcher_starts_the_program(tmp_path: Path, ranks: int, launcher: list[str]) -> None:
    command = [*launcher, harness.REPOSITORY / "launch/preflight.py", *run_file(tmp_path, ranks)]
    good = harness.launch(command)
    assert good.returncode == 0, good.stderr
    assert good.stderr.count("preflight: go") == 1 and good.stderr.count("write MB/s") == 1
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["world_size"] == ranks
    if ranks > 1:
        bad = harness.launch([*command, "--min_bandwidth", "1000000"])
        assert bad.stderr.count("preflight: no go") == 1 and "AgreedError" not in bad.stderr
        assert bad.returncode == (1 if launcher[0] == "torchrun" else 2)  # torchrun has a code of its own
