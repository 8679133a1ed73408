"""Export: a run's weights and a predictor that needs neither this package nor DeepSpeed.

gdyn export RUN_DIR      writes RUN_DIR/export/{weights.safetensors, predictor.pt2, predictor.json}
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts launch/ first, where a file could shadow a library's module; the project's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging

from jsonargparse import auto_cli

from gdyn import cli

log = logging.getLogger("gdyn")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 user error."""
    cli.start_logging(True)
    return cli.guarded(lambda: auto_cli(export, args=argv, prog="gdyn export", exit_on_error=False))


def export(run_dir: str, checkpoint: str = "best", output: str | None = None) -> None:
    """Write consolidated fp32 weights (safetensors) and the network as a torch.export program.

    The program is run beside the network it came from, and must give the same numbers.

    Args:
        run_dir: Folder of a training run.
        checkpoint: best, latest, or a tag.
        output: Folder to write; default RUN_DIR/export.
    """
    import torch
    from safetensors.torch import save_file

    from gdyn.inference import load_run
    from gdyn.rundir import versions, write_json

    run = load_run(run_dir, checkpoint)
    predictor = run.engine.predictor(run.model)
    folder = Path(output) if output else run.dir.export
    folder.mkdir(parents=True, exist_ok=True)
    save_file(run.model.state_dict(), folder / "weights.safetensors")
    with torch.no_grad():
        program = torch.export.export(predictor.network, predictor.example, dynamic_shapes=predictor.dynamic_shapes)
        difference = (program.module()(*predictor.other) - predictor.network(*predictor.other)).abs().max()
    assert difference <= 1e-5, f"the exported program differs by {difference}"
    torch.export.save(program, folder / "predictor.pt2")
    card = {
        "run": str(run.dir.path),
        "checkpoint": run.tag,
        "engine": run.config.to_dict()["engine"],
        "inputs": predictor.inputs,
        "output": predictor.output,
        "use": "torch.export.load('predictor.pt2').module()(*inputs)",
        "versions": versions(),
    }
    write_json(folder / "predictor.json", card)
    log.info("wrote %s: weights.safetensors, predictor.pt2, predictor.json (checkpoint %s).", folder, run.tag)


if __name__ == "__main__":
    sys.exit(main())
