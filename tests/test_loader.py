"""Which samples, in which order, on which rank. Compared with sets and counts, and with the kernel's own memory
count."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gdyn.engines.vamp.engine import Vamp
from gdyn.engines.vamp.frames import FramePairs, Trajectory
from gdyn.errors import UserError
from gdyn.loader import Loader
from gdyn.phases import Phase
from gdyn.ranks import RankContext
from tests import runs
from tests.data import write_trajectory
from tests.harness import REPOSITORY


class Numbers:
    """A data set whose samples are their own indices."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        return {"i": torch.from_numpy(np.asarray(indices))}


def ranks(world, n=100, micro=3, accumulation=2, **options):
    """The loaders of all ranks of a job."""
    return [Loader(Numbers(n), micro, accumulation, RankContext(rank, world), **options) for rank in range(world)]


def numbers(batches):
    return [batch["i"].tolist() for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def epoch_of(loaders, epoch=0, start=0):
    """Windows of an epoch: for each, the sorted samples of all ranks and micro-batches."""
    per_rank = [list(loader.windows(epoch, start)) for loader in loaders]
    return [sorted(flat(numbers(flat(windows)))) for windows in zip(*per_rank, strict=True)]


@pytest.mark.parametrize(
    ("n", "world", "micro", "accumulation"), [(100, 1, 3, 2), (100, 4, 3, 2), (96, 2, 4, 3), (7, 3, 1, 2)]
)
def test_an_epoch_is_whole_windows_with_every_sample_at_most_once(n, world, micro, accumulation):
    loaders = ranks(world, n, micro, accumulation)
    size = world * micro * accumulation
    windows = epoch_of(loaders)
    seen = flat(windows)
    assert [len(window) for window in windows] == [size] * (n // size)
    assert len(set(seen)) == len(seen) == n - n % size == n - loaders[0].remainder
    assert all(len(window) == accumulation for window in loaders[0].windows(0))


def test_the_remainder_of_an_epoch_is_trained_in_others():
    loaders = ranks(1, n=11, micro=5, accumulation=2)
    left_out = [set(range(11)) - set(flat(epoch_of(loaders, epoch))) for epoch in range(5)]
    assert all(len(left) == 1 for left in left_out) and len(set.union(*left_out)) > 1


def test_a_window_holds_the_same_samples_for_any_split_into_ranks_and_micro_batches():
    reference = epoch_of(ranks(1, micro=12, accumulation=1), epoch=3)
    for world, micro, accumulation in [(1, 3, 4), (2, 6, 1), (2, 3, 2), (4, 3, 1), (3, 2, 2), (12, 1, 1)]:
        assert epoch_of(ranks(world, micro=micro, accumulation=accumulation), epoch=3) == reference


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return epoch_of(ranks(2, seed=seed), epoch)

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_an_epoch_continues_in_the_middle_also_on_another_number_of_ranks():
    whole = epoch_of(ranks(2, micro=3, accumulation=2), epoch=5)
    assert epoch_of(ranks(2, micro=3, accumulation=2), epoch=5, start=36) == whole[3:]
    assert epoch_of(ranks(4, micro=3, accumulation=1), epoch=5, start=36) == whole[3:]


def test_limit_and_overfit_windows():
    assert len(epoch_of(ranks(2, limit_windows=2))) == 2
    overfit = ranks(2, overfit_windows=1)
    assert epoch_of(overfit, 0) == epoch_of(overfit, 1) and len(epoch_of(overfit)) == 1
    assert epoch_of(ranks(2, limit_windows=2), 1) == epoch_of(ranks(2), 1)[:2]


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 3, 64])
def test_a_shard_covers_everything_once_and_all_ranks_get_as_many_batches(n, world, micro):
    shards = [list(loader.shard()) for loader in ranks(world, n, micro)]
    counted = [numbers(batch for batch, counts in shard if counts) for shard in shards]
    assert flat(flat(counted)) == list(range(n))  # contiguous, in order, by rank
    assert len({len(shard) for shard in shards}) == 1
    assert all(0 < len(batch["i"]) <= micro for shard in shards for batch, _ in shard)


def test_too_few_samples_for_one_window_is_a_clear_error():
    with pytest.raises(
        UserError, match=r"11 samples, one optimizer step takes 12 \(micro-batch 3 x accumulation 2 x 2 ranks\)"
    ):
        ranks(2, n=11)[0].check()


def test_pairs_of_several_trajectories_never_reach_across_their_ends(tmp_path):
    lengths, tau = (30, 20, 25), 4
    trajectories = [Trajectory(write_trajectory(tmp_path / f"{i}", frames=f, seed=i)) for i, f in enumerate(lengths)]
    pairs = FramePairs(trajectories, tau)
    stored = [np.load(tmp_path / f"{i}" / "nbr_dists.npy") for i in range(3)]
    expected = [(d[t], d[t + tau]) for d in stored for t in range(len(d) - tau)]
    assert len(pairs) == len(expected) == sum(lengths) - 3 * tau
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    first, second = pairs[shuffled]["nbr_dists"].numpy().reshape(2, len(pairs), *stored[0].shape[1:])
    assert np.array_equal(first, [expected[i][0] for i in shuffled])
    assert np.array_equal(second, [expected[i][1] for i in shuffled])


def test_worker_processes_give_the_same_batches(tmp_path):
    pairs = FramePairs([Trajectory(write_trajectory(tmp_path / "a", frames=60))], tau=3)
    alone = Loader(pairs, 8, 2, RankContext(), seed=4)
    here, there = ([b for w in loader.windows(1, 16) for b in w] for loader in (alone, replace(alone, workers=1)))
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


READ_EVERYTHING = """
import json, sys
import numpy as np
from gdyn.engines.vamp.frames import Trajectory

def resident():
    # of this moment, unlike ru_maxrss
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

trajectory = Trajectory(sys.argv[1])
before, peak = resident(), 0
for start in range(0, len(trajectory), 500):
    trajectory.frames(np.arange(start, min(start + 500, len(trajectory))))
    peak = max(peak, resident())
print(json.dumps([before, peak]))
"""


def test_resident_memory_does_not_grow_with_the_trajectory(tmp_path):
    """Two arrays of 240 MB, sparse on disk, are read from end to end."""
    folder, shape = write_trajectory(tmp_path / "long", frames=2, atoms=50), (60_000, 50, 20)
    for name, kind in (("nbr_lists.npy", np.int32), ("nbr_dists.npy", np.float32)):
        np.lib.format.open_memmap(folder / name, "w+", kind, shape)
    command = [sys.executable, "-c", READ_EVERYTHING, folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    before, peak = json.loads(done.stdout)
    assert peak - before < 150


def test_a_quick_run_evaluates_the_same_samples_on_any_number_of_ranks():
    seen = [
        sorted(flat(flat(numbers(batch for batch, counts in loader.shard() if counts) for loader in loaders)))
        for loaders in (
            ranks(1, micro=4, accumulation=1, limit_windows=3),
            ranks(2, micro=1, accumulation=2, limit_windows=3),
        )
    ]
    assert seen == [list(range(12))] * 2


# Samples that differ in size


class Sized(Numbers):
    """Sizes like the lengths of proteins: few are long."""

    def __init__(self, n, seed=0, most=600):
        super().__init__(n)
        self.sizes = np.minimum(20 + np.random.default_rng(seed).lognormal(4, 0.8, n).astype(int), most)
        self.identifiers = [f"protein{i}" for i in range(n)]


def sized_ranks(dataset, world, micro, accumulation, max_size=None, **options):
    return [
        Loader(dataset, micro, accumulation, RankContext(rank, world), max_size=max_size, **options)
        for rank in range(world)
    ]


def loads_of(loaders, sizes, epoch=0):
    """(windows, micro-batches of all ranks): sums of sizes."""
    per_rank = [[[sizes[b["i"]].sum() for b in window] for window in loader.windows(epoch)] for loader in loaders]
    return np.concatenate(per_rank, axis=1)


SHAPES = [(1, 1, 20), (1, 4, 5), (2, 2, 6), (3, 1, 8), (8, 1, 4)]
"""Ranks, accumulation, samples per micro-batch."""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("world", "accumulation", "micro"), SHAPES)
def test_sizes_change_who_gets_a_sample_but_not_the_samples_of_a_window(world, accumulation, micro, seed):
    plain = ranks(world, 500, micro, accumulation, seed=seed)
    sized = sized_ranks(Sized(500, seed), world, micro, accumulation, seed=seed)
    roomy = sized_ranks(Sized(500, seed), world, micro, accumulation, max_size=10**6, seed=seed)
    assert epoch_of(sized, 2) == epoch_of(roomy, 2) == epoch_of(plain, 2)
    assert sized[0].remainder == roomy[0].remainder == plain[0].remainder
    assert all(len(b["i"]) == micro for loader in sized for window in loader.windows(2) for b in window)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("world", "accumulation", "micro"), SHAPES[1:])
def test_the_micro_batches_of_a_window_differ_by_less_than_the_largest_sample(world, accumulation, micro, seed):
    dataset = Sized(600, seed)
    undealt = loads_of(ranks(world, 600, micro, accumulation, seed=seed), dataset.sizes)
    dealt = loads_of(sized_ranks(dataset, world, micro, accumulation, seed=seed), dataset.sizes)
    assert np.array_equal(dealt.sum(1), undealt.sum(1))
    assert np.ptp(dealt, axis=1).max() < dataset.sizes.max()
    # A window lasts as long as its largest micro-batch.
    assert np.mean(dealt.max(1) / dealt.mean(1)) < 1 + 0.5 * np.mean(undealt.max(1) / undealt.mean(1) - 1)
    bounded = loads_of(sized_ranks(dataset, world, micro, accumulation, 1500, seed=seed), dataset.sizes)
    assert np.ptp(bounded, axis=1).max() < dataset.sizes.max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("world", "accumulation", "micro"), SHAPES)
@pytest.mark.parametrize("max_size", [700, 1500])
def test_a_bound_on_sizes_holds_and_every_sample_comes_at_most_once(world, accumulation, micro, max_size, seed):
    dataset = Sized(800, seed, most=max_size)
    loaders = sized_ranks(dataset, world, micro, accumulation, max_size, seed=seed)
    for epoch in (0, 1):
        windows = epoch_of(loaders, epoch)
        seen = flat(windows)
        order = np.random.default_rng([seed, epoch]).permutation(800)
        assert loads_of(loaders, dataset.sizes, epoch).max() <= max_size
        assert sorted(seen) == sorted(order[: len(seen)].tolist()) and len(set(seen)) == len(seen)
        assert len(seen) == loaders[0].samples_per_epoch(epoch)
        assert len(windows) == loaders[0].windows_per_epoch(epoch)
        assert np.cumsum([len(window) for window in windows]).tolist() == loaders[0].ends(epoch).tolist()
        counts = [len(b["i"]) for loader in loaders for window in loader.windows(epoch) for b in window]
        assert min(counts) >= 1 and max(counts) <= micro
    assert loaders[0].remainder == 800 - loaders[0].samples_per_epoch(0)


def test_a_window_is_as_full_as_its_samples_allow():
    """Of small samples, and of more ranks than usual: nearly nothing is left free."""
    dataset = Sized(20_000)
    loads = loads_of(sized_ranks(dataset, 16, 1000, 2, max_size=4000), dataset.sizes)
    assert loads.mean() > 0.98 * 4000


def test_a_bounded_window_depends_on_the_number_of_micro_batches_only():
    reference = epoch_of(sized_ranks(Sized(500), 4, 6, 1, 600), 3)
    for world, accumulation in [(2, 2), (1, 4)]:
        assert epoch_of(sized_ranks(Sized(500), world, 6, accumulation, 600), 3) == reference


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_bounded_epoch_continues_in_the_middle(done):
    loaders = sized_ranks(Sized(500), 2, 8, 2, 600)
    whole = epoch_of(loaders, 4)
    start = sum(len(window) for window in whole[:done])
    assert epoch_of(loaders, 4, start) == whole[done:]
    other = flat(epoch_of(sized_ranks(Sized(500), 3, 8, 1, 600), 4, start))
    assert len(set(other)) == len(other) and not set(other) & set(flat(whole[:done]))


def test_limits_count_bounded_windows():
    whole, bound = epoch_of(sized_ranks(Sized(500), 2, 8, 1, 600), 1), {"max_size": 600}
    limited = sized_ranks(Sized(500), 2, 8, 1, **bound, limit_windows=3)
    assert epoch_of(limited, 1) == whole[:3]
    assert epoch_of(limited, 1, len(whole[0])) == whole[1:3]
    overfit = sized_ranks(Sized(500), 2, 8, 1, **bound, overfit_windows=2)
    assert epoch_of(overfit, 0) == epoch_of(overfit, 7) and len(epoch_of(overfit, 7)) == 2


@pytest.mark.parametrize("n", [1, 5, 64, 300])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("micro", [1, 6, 500])
def test_a_bounded_shard_covers_everything_once_and_all_ranks_get_as_many_batches(n, world, micro):
    dataset = Sized(n)
    shards = [list(loader.shard()) for loader in sized_ranks(dataset, world, micro, 1, 600)]
    counted = [numbers(batch for batch, counts in shard if counts) for shard in shards]
    assert flat(flat(counted)) == list(range(n))
    assert len({len(shard) for shard in shards}) == 1
    batches = [batch["i"] for shard in shards for batch, _ in shard]
    assert all(0 < len(batch) <= micro and dataset.sizes[batch].sum() <= 600 for batch in batches)


def test_a_sample_that_no_micro_batch_may_hold_is_named():
    dataset = Sized(100)
    dataset.sizes[[7, 9]] = 3000, 2800
    loader = Loader(dataset, 4, 1, RankContext(), max_size=2799, size_key="engine.max_residues")
    with pytest.raises(UserError, match=r"protein7 has the size 3000, but engine\.max_residues = 2799.*\(2 of 100"):
        loader.check()
    del dataset.identifiers
    with pytest.raises(UserError, match="sample 7 has the size 3000"):
        loader.check()
    replace(loader, max_size=3000).check()


def test_too_few_samples_for_one_bounded_window_is_a_clear_error():
    with pytest.raises(UserError, match=r"5 samples, one optimizer step .*\(micro-batch 4 of at most max_size 9000 x"):
        sized_ranks(Sized(5), 2, 4, 1, 9000)[0].check()


# Samples of like size together


def like_ranks(world, micro=4, accumulation=1, n=500, **options):
    return sized_ranks(Sized(n), world, micro, accumulation, like_sizes=True, **options)


def padding(windows, sizes):
    """Share of rows that are none of a sample's, where each list of samples is one batch."""
    return 1 - sum(sizes[w].sum() for w in windows) / sum(len(w) * sizes[w].max() for w in windows)


LIKE = [(1, 1, 24), (1, 4, 6), (2, 2, 6), (3, 1, 8), (8, 1, 3)]
"""Ranks, accumulation, samples per micro-batch, of the same window size."""


@pytest.mark.parametrize("epoch", range(3))
@pytest.mark.parametrize(("world", "accumulation", "micro"), LIKE)
def test_windows_of_like_size_are_the_same_for_any_split(world, accumulation, micro, epoch):
    windows = epoch_of(like_ranks(world, micro, accumulation), epoch)
    assert windows == epoch_of(like_ranks(1, 24), epoch)
    assert [len(window) for window in windows] == [24] * (500 // 24)
    assert len(set(flat(windows))) == 500 - 500 % 24
    assert all(len(b["i"]) == micro for b in flat(like_ranks(world, micro, accumulation)[0].windows(epoch)))


def test_like_sizes_leave_a_fraction_of_the_padding():
    sizes = Sized(500).sizes
    plain, like = (epoch_of(sized_ranks(Sized(500), 1, 24, 1, like_sizes=wish), 1) for wish in (False, True))
    assert padding(like, sizes) < 0.5 * padding(plain, sizes)
    # Micro-batches of a window are of like size, too
    micro = [numbers(window) for window in like_ranks(1, 6, 4)[0].windows(1)]
    assert padding(flat(micro), sizes) < 0.8 * padding(like, sizes)


@pytest.mark.parametrize(("world", "accumulation", "micro"), LIKE[2:])
def test_ranks_compute_alike_micro_batches_at_the_same_time(world, accumulation, micro):
    sizes = Sized(500).sizes
    per_rank = [list(loader.windows(0)) for loader in like_ranks(world, micro, accumulation)]
    for windows in zip(*per_rank, strict=True):
        for together in zip(*windows, strict=True):
            loads = [int(sizes[b["i"]].sum()) for b in together]
            assert max(loads) - min(loads) <= max(sizes[b["i"]].max() for b in together)


def test_epochs_of_like_sizes_differ_in_windows_in_their_order_and_in_what_is_left_out():
    epochs = [epoch_of(like_ranks(1, 24), epoch) for epoch in range(8)]
    assert epochs[0] == epoch_of(like_ranks(2, 12), 0)
    assert not set(map(str, epochs[0])) & set(map(str, epochs[1]))
    sizes = Sized(500).sizes
    means = np.array([[sizes[window].mean() for window in windows] for windows in epochs])
    # No place in an epoch is that of the large ones
    assert np.ptp(means.argmax(1)) > 3 and (np.diff(means, axis=1) < 0).any(1).all()
    left = [sorted(set(range(500)) - set(flat(windows))) for windows in epochs]
    assert len(set(map(str, left))) == len(left)
    assert abs(np.mean([sizes[out].mean() for out in left]) / sizes.mean() - 1) < 0.3


def test_an_epoch_of_like_sizes_continues_in_the_middle_also_on_another_number_of_ranks():
    whole = epoch_of(like_ranks(2, 12), 5)
    for world, micro, accumulation in [(2, 12, 1), (4, 6, 1), (1, 8, 3)]:
        assert epoch_of(like_ranks(world, micro, accumulation), 5, start=7 * 24) == whole[7:]


@pytest.mark.parametrize("max_size", [700, 1500])
def test_like_sizes_and_a_bound_on_them_go_together(max_size):
    dataset = Sized(800, most=max_size)
    like, plain = (sized_ranks(dataset, 2, 8, 2, max_size, like_sizes=wish) for wish in (True, False))
    windows = epoch_of(like, 1)
    seen = flat(windows)
    assert loads_of(like, dataset.sizes, 1).max() <= max_size
    assert len(set(seen)) == len(seen) == like[0].samples_per_epoch(1) > 750
    assert padding(windows, dataset.sizes) < 0.8 * padding(epoch_of(plain, 1), dataset.sizes)
    start = sum(len(window) for window in windows[:3])
    assert epoch_of(like, 1, start) == windows[3:]


@pytest.mark.parametrize("n", [1, 5, 64, 300])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("max_size", [None, 600])
def test_a_shard_in_the_order_of_size_covers_everything_once(n, world, max_size):
    loaders = sized_ranks(Sized(n), world, 6, 1, max_size, like_sizes=True)
    shards = [list(loader.shard()) for loader in loaders]
    assert sorted(flat(flat(numbers(b for b, counts in shard if counts) for shard in shards))) == list(range(n))
    assert len({len(shard) for shard in shards}) == 1
    assert all(0 < len(b["i"]) <= 6 for shard in shards for b, _ in shard)
    sizes = Sized(n).sizes
    together = zip(*shards, strict=True)
    largest = [max(int(sizes[b["i"]].max()) for b, counts in batches if counts) for batches in together]
    assert largest == sorted(largest)


class SizedPairs(FramePairs):
    """Pretends that pairs differ in size."""

    @property
    def sizes(self):
        return 1 + np.arange(len(self)) % 7


class SizedVamp(Vamp):
    """With micro-batches of bounded size."""

    max_size = 60

    def datasets(self):
        return {split: SizedPairs(pairs.trajectories, pairs.tau) for split, pairs in super().datasets().items()}


def test_a_run_with_bounded_windows_resumes_as_if_never_stopped(run_ranks, tmp_path):
    def config(name):
        small = runs.small_run(tmp_path, name, phases=[Phase("vamp2", 2)])
        return replace(small, engine=SizedVamp(**vars(small.engine)))

    whole, stopped = config("whole"), config("stopped")
    run_ranks(1, runs.run, whole)
    run_ranks(1, runs.run, stopped, 17)
    assert runs.store(stopped).whole()[0].position.sample > 0
    run_ranks(1, runs.run, stopped)
    runs.assert_same(stopped, whole)
    loader = Loader(whole.engine.datasets()["train"], 48, 1, RankContext(), seed=whole.seed, max_size=60)
    assert runs.summary(whole)["steps"] == sum(loader.windows_per_epoch(epoch) for epoch in range(2))
