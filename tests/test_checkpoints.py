"""A checkpoint is whole or does not count; damage is named; nothing restarts from scratch unasked; pruning keeps "
"what matters."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdyn.checkpoints import CheckpointStore
from gdyn.errors import MissingFile, UserError
from gdyn.phases import Phase, Plan, Position
from gdyn.ranks import ALONE, RankContext
from tests import runs
from tests.harness import RanksFailed

PLAN = Plan((Phase("vamp2", 3), Phase("vamp1", 3)))


class FakeDs:
    """Of a DeepSpeed engine, what a store needs."""

    def __init__(self, stage=1):
        self.module, self.stage = torch.nn.Linear(3, 2), stage

    def zero_optimization_stage(self):
        return self.stage

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        path = Path(folder, tag)
        path.mkdir()
        (path / "optimizer_states.pt").write_bytes(bytes(range(200)))


class Killed(BaseException):
    """Ends a save where it stands, as kill -9 does."""


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, ALONE)


def save(store, *positions, best=None, ds=None, **more):
    """Checkpoints at these (phase, epoch), in order; returns their tags."""
    facts = {"seed": 0, "global_batch": 1, "trains": [], "best": best or {}} | more
    places = [Position(phase, epoch, step=10 * (3 * phase + epoch)) for phase, epoch in positions]
    return [store.save(ds or FakeDs(), PLAN, place, facts) for place in places]


def tags(store):
    return [checkpoint.tag for checkpoint in store.whole()]


def flip(path, byte=100):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "flipped": (flip, "optimizer_states.pt has changed (its checksum differs)"),
    "truncated": (truncate, "optimizer_states.pt has 193 bytes, 200 were written"),
    "missing": (Path.unlink, "optimizer_states.pt is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(store, caplog, kind):
    older, newer = save(store, (0, 1), (0, 2))
    spoil, complaint = DAMAGE[kind]
    spoil(store.path / newer / "optimizer_states.pt")
    with pytest.raises(UserError, match="is damaged: optimizer_states.pt .*resume from another tag"):
        store.find(newer)
    with caplog.at_level(logging.WARNING):
        found = store.find("auto")
    assert found.tag == older and found.position == Position(0, 1, step=10)
    assert newer in caplog.text and complaint in caplog.text
    assert (store.path / f"{newer}.broken").is_dir() and not (store.path / newer).exists()


def test_weights_are_covered_by_the_checksums_too(store):
    older, newer = save(store, (0, 1), (0, 2))
    flip(store.path / newer / "weights.safetensors")
    assert store.find("auto").tag == older


@pytest.mark.parametrize(
    "spoil", [lambda p: p.write_text(""), lambda p: p.write_text(p.read_text().replace("10", "11", 1))]
)
def test_a_damaged_position_is_no_position(store, caplog, spoil):
    older, newer = save(store, (0, 2), (0, 1))  # the step of the second is 10
    spoil(store.path / newer / "position.json")
    assert store.find("auto").tag == older
    assert newer in caplog.text and "it is ignored" in caplog.text


def test_when_everything_is_damaged_nothing_restarts_from_scratch_not_even_the_second_time(store):
    for tag in save(store, (0, 1), (0, 2)):
        flip(store.path / tag / "optimizer_states.pt")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"every checkpoint in .* is damaged .*\.broken.*start over in another --run_dir"
        ):
            store.find("auto")
    with pytest.raises(UserError, match="already holds checkpoints"):
        store.find("never")


def test_a_tag_that_is_damaged_twice_is_set_aside_twice(store):
    save(store, (0, 1))
    for broken in ("p0-vamp2-e0002.broken", "p0-vamp2-e0002.broken2"):
        (tag,) = save(store, (0, 2))
        flip(store.path / tag / "optimizer_states.pt")
        assert store.find("auto").tag == "p0-vamp2-e0001"
        assert (store.path / broken).is_dir()


def test_without_history_auto_and_never_start_from_the_beginning(store):
    assert store.find("auto") is None
    assert store.find("never") is None
    save(store, (0, 1))
    with pytest.raises(UserError, match=r"--resume never, but .* already holds checkpoints"):
        store.find("never")


def test_a_save_that_was_interrupted_does_not_count_and_can_be_repeated(store, monkeypatch):
    (before,) = save(store, (0, 1))

    def killed(path, content):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("gdyn.checkpoints.write_json", killed)
        with pytest.raises(Killed):
            save(store, (0, 2))
    assert (store.path / "p0-vamp2-e0002").is_dir()
    assert tags(store) == [before] and (store.path / "latest").read_text().strip() == before
    assert store.find("auto").tag == before
    with pytest.raises(MissingFile, match="not a whole checkpoint"):
        store.find("p0-vamp2-e0002")
    (again,) = save(store, (0, 2))
    assert store.find("auto").tag == again


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_whole(store, monkeypatch):
    save(store, (0, 1), (0, 2), (1, 1))

    def killed(folder):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        replace(store, keep=1).prune()
    assert (store.path / "p0-vamp2-e0002" / "optimizer_states.pt").exists()
    assert store.find("auto").tag == "p1-vamp1-e0001" and "p0-vamp2-e0002" not in tags(store)


def test_a_stale_latest_does_not_hide_the_newest_whole_checkpoint(store):
    older, newer = save(store, (0, 1), (0, 2))
    for stale in (older, "p9-nothing-e0000"):
        (store.path / "latest").write_text(stale)
        assert store.find("auto").tag == newer


def test_a_run_that_went_back_to_an_older_tag_goes_on_from_there(store):
    save(store, (0, 1), (0, 2), (1, 0), (1, 1))
    (again,) = save(store, (0, 2))
    assert store.find("auto").tag == again == "p0-vamp2-e0002"


def test_what_another_program_wrote_is_refused(store, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(MissingFile, match="not a whole checkpoint of this program"):
        store.find(str(foreign))
    for content in ("{}", "[1, 2]", '{"position": {"epoch": 3}}'):
        (foreign / "position.json").write_text(content)
        with pytest.raises(UserError, match="was not written by this program"):
            store.find("foreign")
    with pytest.raises(UserError, match="every checkpoint"):
        store.find("auto")


def test_prune_keeps_the_best_the_newest_and_the_end_of_every_phase(store):
    best = {"vamp2": {"tag": "p0-vamp2-e0001", "score": 1.0, "epoch": 1}}
    save(store, (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), best=best)
    replace(store, keep=2).prune()
    assert tags(store) == ["p2-done-e0000", "p1-vamp1-e0002", "p1-vamp1-e0000", "p0-vamp2-e0001"]
    replace(store, save_best_only=True).prune()
    assert tags(store) == ["p2-done-e0000", "p0-vamp2-e0001"]


def test_prune_keeps_the_best_of_every_objective(store):
    best = {
        word: {"tag": tag, "score": 0.5, "epoch": 1}
        for word, tag in [("vamp2", "p0-vamp2-e0001"), ("vamp1", "p1-vamp1-e0001")]
    }
    save(store, (0, 1), (0, 2), (1, 1), (1, 2), best=best)
    replace(store, save_best_only=True).prune()
    assert tags(store) == ["p1-vamp1-e0002", "p1-vamp1-e0001", "p0-vamp2-e0001"]
    assert store.best() == best


def test_prune_keeps_what_a_phase_restores_as_long_as_one_may_resume_where_it_does(store):
    save(store, (0, 1), (0, 2), (1, 0), phase_best={"tag": "p0-vamp2-e0001", "score": 0.5, "epoch": 1})
    save(store, (1, 1))
    replace(store, keep=1).prune()
    assert tags(store) == ["p1-vamp1-e0001", "p1-vamp1-e0000", "p0-vamp2-e0001"]
    replace(store, save_best_only=True).prune()
    assert tags(store) == ["p1-vamp1-e0001"]


def test_prune_removes_converted_copies_and_leaves_damaged_ones(store):
    save(store, (0, 1))
    for name in ("p0-vamp2-e0001.universal", "p0-vamp2-e0001.universal.partial", "p0-vamp2-e0000.broken"):
        (store.path / name).mkdir()
    store.prune()
    assert sorted(path.name for path in store.path.iterdir() if path.is_dir()) == [
        "p0-vamp2-e0000.broken",
        "p0-vamp2-e0001",
    ]


def test_the_best_so_far_travels_with_every_checkpoint(store):
    """Killed between position.json and best.json, or gone back: the best is again what it was when the checkpoint "
    "was written."""
    entry = {"vamp2": {"tag": "p0-vamp2-e0001", "score": 1.0, "epoch": 1}}
    save(store, (0, 1), (0, 2), best=entry)
    (store.path / "best.json").write_text(json.dumps({"vamp2": {"tag": "p0-vamp2-e0002", "score": 2.0, "epoch": 2}}))
    store.recall_best(store.find("auto"))
    assert store.best() == entry


def test_a_best_that_is_gone_is_no_best(store):
    best = {"vamp2": {"tag": "p0-vamp2-e0001", "score": 1.0, "epoch": 1}}
    save(store, (0, 1), (0, 2), best=best)
    (store.path / "p0-vamp2-e0001").rename(store.path / "p0-vamp2-e0001.broken")
    assert store.best() == {}


def test_another_zero_stage_is_refused_with_the_cure(store):
    save(store, (0, 1), ds=FakeDs(stage=1))
    with pytest.raises(UserError, match=r"written with ZeRO stage 1, .* now says 2; keep the stage, or .* --init_from"):
        store.reshape(store.find("auto"), 2)


def test_ranks_agree_on_damage_that_only_one_of_them_reads(run_ranks, tmp_path):
    older, newer = save(CheckpointStore(tmp_path, ALONE), (0, 1), (0, 2))
    flip(tmp_path / newer / "weights.safetensors")  # the second of two files: rank 1 reads it
    assert run_ranks(2, found, tmp_path) == [older, older]


def found(here: RankContext, path: Path) -> str:
    return CheckpointStore(path, here).find("auto").tag


def test_the_checkpoint_of_another_network_is_refused_on_every_rank(run_ranks, tmp_path):
    config = runs.small_run(tmp_path, "run", split=(2, 1), phases=[Phase("vamp2", 1)])
    run_ranks(2, runs.run, config)
    other = replace(
        config, engine=replace(config.engine, atom_fea_len=4), phases=[Phase("vamp2", 1), Phase("vamp1", 1)]
    )
    with pytest.raises(RanksFailed, match="do not fit the engine of the run file: .* has shape") as failure:
        run_ranks(2, runs.run, other)
    assert len(failure.value.errors) == 2 and all(
        isinstance(error, UserError) for error in failure.value.errors.values()
    )
