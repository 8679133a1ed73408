"""The same global batch gives one score and gradient for any split into ranks x micro-batches, at every ZeRO stage.

The whole trainer runs on real ranks; the reference is one rank with one micro-batch at ZeRO stage 0.
"""

from typing import Any

import pytest

from gdyn.phases import Phase
from tests import runs
from tests.data import write_trajectory
from tests.exactness import TOLERANCE, Result, assert_exact, differences, watch

STEPS = 3
SPLITS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]
CASES = {
    "vamp2-independent": {"phases": [Phase("vamp2", 1)]},
    "vamp_sym-shared": {"phases": [Phase("vamp_sym", 1)], "lobe_sharing": "shared", "vamp_sym_gradient": "exact"},
    "vamp1-ferro": {"phases": [Phase("vamp1", 1)], "model_type": "ferro"},
    "vampe-legacy": {"phases": [Phase("vampe", 1)], "mode": "regularize", "epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def result(run_ranks, tmp_path_factory):
    """result(case, split, stage, **changes): gradients and scores of a run of three steps; each is run once."""
    folder, done = tmp_path_factory.mktemp("exactness"), {}
    for name, seed in (("train", 0), ("validation", 1)):
        write_trajectory(folder / name, frames=200, targets=2, ferro=True, seed=seed)

    def get(case: str, split: tuple[int, int], stage: int = 0, **changes: Any) -> Result:
        key = f"{case}-{split}-{stage}-{changes}"
        if key not in done:
            settings = {"limit_windows": STEPS} | CASES[case] | changes
            config = runs.small_run(folder, f"run{len(done)}", stage=stage, split=split, **settings)
            done[key] = watch(run_ranks, split[0], config, ("loss", "vamp1", "vamp2"))
            assert len(done[key].gradients) == STEPS
        return done[key]

    return get


@pytest.mark.parametrize(("stage", "split"), [(0, (1, 4)), (0, (2, 2)), (1, (2, 1))])
def test_any_split_of_the_global_batch_gives_the_same_score_and_gradient(result, stage, split):
    assert_exact(result("vamp2-independent", split, stage), result("vamp2-independent", (1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{split[0]}x{split[1]}")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_exactness_holds_for_every_split_at_every_zero_stage(result, stage, split):
    assert_exact(result("vamp2-independent", split, stage), result("vamp2-independent", (1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "vamp2-independent"])
def test_exactness_holds_for_other_objectives_lobes_and_sharing(result, case):
    assert_exact(result(case, (2, 2), 1), result(case, (1, 1)))


def test_local_scope_is_not_exact_so_these_tests_can_fail(result):
    local = result("vamp2-independent", (1, 4), covariance_scope="local")
    scores, slopes = differences(local, result("vamp2-independent", (1, 1)))
    assert scores > 100 * TOLERANCE and slopes > 100 * TOLERANCE


@pytest.mark.slow
def test_batch_norm_is_not_exact_and_synchronised_over_ranks(result):
    """Two ranks share one micro-batch's statistics, four micro-batches do not."""
    whole, ranks, micro_batches = (
        result("vamp2-independent", split, norm="batch") for split in ((1, 1), (2, 1), (1, 4))
    )
    assert differences(ranks, whole)[1] < 1e-3 < differences(micro_batches, whole)[1]
