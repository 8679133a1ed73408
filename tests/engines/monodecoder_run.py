"""A monodecoder run that was really trained, for the tests of what is done with one."""

from pathlib import Path

from gdyn.config import Logging, Optimization, RunConfig
from gdyn.engines import Monodecoder
from gdyn.inference import Run, load_run
from gdyn.phases import Phase
from gdyn.recipes import bundled
from tests import runs
from tests.harness import run_ranks
from tests.proteins import write_proteins

CODES, LEAST_PLDDT = 12, 0.3
"""Letters; some of the generated residues have a lower confidence than that."""


def trained_run(folder: Path) -> Run:
    """A few epochs on generated structures; its data are made in `folder`."""
    train = write_proteins(folder / "train.h5", structures=48)
    test = write_proteins(folder / "test.h5", structures=8, seed=1)
    sizes = {"codes": CODES, "embedding_dim": 8, "hidden": [16, 16, 16], "heads": 2, "feed_forward": 16}
    paths = {"train": [str(train)], "validation": [str(test)], "test": [str(test)]}
    config = RunConfig(
        engine=Monodecoder(**paths, **sizes, mask_plddt=True, plddt_threshold=LEAST_PLDDT),  # type: ignore[arg-type]
        phases=[Phase("loss", 8)],
        deepspeed=str(bundled()["fp32_zero0"]),
        optimization=Optimization(8, learning_rate=0.01),
        logging=Logging(every_steps=6, progress="off"),
        run_dir=str(folder / "run"),
    )
    run_ranks(1, runs.run, config, timeout=180)
    return load_run(config.run_dir)
