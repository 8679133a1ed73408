"""A table of what users get wrong with a run that works."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from tests.data import write_trajectory
from tests.trial import Trial

Spoil = Callable[[Trial], Any]
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {}
"""Name -> how to spoil a good run, and what the message must say (parts, in any order)."""


def cases(**spoilt: tuple[Any, ...]) -> None:
    for name, (spoil, *said) in spoilt.items():
        assert said and name not in CASES
        CASES[name] = (spoil, tuple(said))


# The run file and the command line.
cases(
    run_file_missing=(lambda t: setattr(t, "config", Path("nowhere.yaml")), "nowhere.yaml", "does not exist"),
    run_file_is_a_folder=(lambda t: setattr(t, "config", t.train), "train", "is a folder"),
    run_file_empty=(lambda t: setattr(t, "run_file", ""), "run.yaml", "is empty"),
    section_is_a_number=(lambda t: t.run.update(optimization=3), "keys and values"),
    run_file_is_a_list=(lambda t: setattr(t, "run_file", "- 1\n- 2\n"), "run.yaml", "is a list"),
    run_file_not_yaml=(lambda t: setattr(t, "run_file", "engine: [unclosed\nrun_dir: }"), "run.yaml", "not valid YAML"),
    run_file_binary=(lambda t: setattr(t, "run_file", bytes(range(128, 256))), "run.yaml", "not a text file"),
    key_unknown=(lambda t: t.run.update(lossschedule=[]), "lossschedule", 'Did you mean "loss_schedule"'),
    key_of_engine_unknown=(lambda t: t.vamp.update(state_length=3), "state_length", 'Did you mean "state_len"'),
    key_of_section_unknown=(
        lambda t: t.run["optimization"].update(batchsize=3),
        "optimization",
        "batchsize",
        'Did you mean "batch_size"',
    ),
    key_of_phase_unknown=(lambda t: phases(t, epoch=1), "phases", 'Did you mean "epochs"'),
    engine_misspelt=(
        lambda t: t.run["engine"].update(class_path="Vmap"),
        'unknown engine "Vmap"',
        "known: Diffusion, Monodecoder, Vamp",
    ),
    engine_missing=(lambda t: t.run.pop("engine"), "engine"),
    run_dir_missing=(lambda t: t.run.pop("run_dir"), "run_dir"),
    validation_missing=(lambda t: t.vamp.pop("validation"), "validation"),
    objective_misspelt=(lambda t: t.run.update(loss_schedule=["vamp3"]), '"vamp3"', "vamp1, vamp2"),
    tau_a_word=(lambda t: t.vamp.update(tau="ten"), "tau", "ten"),
    tau_negative=(lambda t: t.vamp.update(tau=-1), "tau", "-1"),
    tau_a_fraction=(lambda t: t.vamp.update(tau=1.5), "tau", "1.5"),
    cutoff_zero=(lambda t: t.vamp.update(cutoff=0.0), "cutoff", "0"),
    model_type_unknown=(lambda t: t.vamp.update(model_type="feroo"), "model_type", "feroo", "ferro"),
    one_state=(lambda t: t.vamp.update(state_len=1), "state_len = 1", "2"),
    one_gaussian=(lambda t: t.vamp.update(num_gaussians=1), "num_gaussians = 1", "2"),
    no_train_data=(lambda t: t.vamp.update(train=[]), "engine.train", "at least one"),
    phases_twice=(
        lambda t: t.run.update(phases=[{"objective": "vamp2", "epochs": 1}]),
        "phases",
        "loss_schedule",
        "not both",
    ),
    phases_absent=(lambda t: (t.run.pop("loss_schedule"), t.run.pop("epochs")), "no phases", "loss_schedule"),
    epochs_absent=(lambda t: t.run.pop("epochs"), "loss_schedule needs epochs"),
    epochs_zero=(lambda t: t.run.update(epochs=0), "run.yaml: epochs", "Found: 0"),
    epochs_of_phase_zero=(lambda t: phases(t, epochs=0), r"phases\[0\].epochs = 0", "at least one"),
    trains_nothing=(lambda t: phases(t, trains=["encoder.*"]), "encoder", "matches no parameter", "lobe_0"),
    trains_empty=(lambda t: phases(t, trains=[]), r"phases\[0\].trains is empty"),
    option_unknown=(lambda t: t.argv.extend(["--sead", "3"]), "sead", 'Did you mean "seed"'),
    option_without_value=(lambda t: t.argv.append("--seed"), "seed"),
    option_of_list_item=(lambda t: t.argv.extend(["--phases.0.epochs", "3"]), "phases.0.epochs", "run file"),
    seed_negative=(lambda t: t.argv.extend(["--seed", "-3"]), "seed", "-3"),
    workers_negative=(lambda t: t.argv.extend(["--workers", "-1"]), "workers", "-1"),
    mode_unknown=(lambda t: t.argv.extend(["--mode", "tarin"]), "mode", "tarin", "train"),
)


def phases(t: Trial, **changes: Any) -> None:
    del t.run["loss_schedule"], t.run["epochs"]
    t.run["phases"] = [{"objective": "vamp2", "epochs": 1} | changes]


# The DeepSpeed JSON.
cases(
    json_missing=(lambda t: t.run.update(deepspeed="fp23_zero0"), '"fp23_zero0"', "fp32_zero0"),
    json_syntax=(lambda t: t.run.update(deepspeed=write(t, "broken.json", "{'a': 1,}")), "broken.json", "line 1"),
    json_not_an_object=(lambda t: t.run.update(deepspeed=write(t, "list.json", "[]")), "list.json", "one JSON object"),
    json_key_unknown=(lambda t: t.json.update(gradient_cliping=1.0), "gradient_cliping", '"gradient_clipping"'),
    json_key_removed=(
        lambda t: t.json["zero_optimization"].update(cpu_offload=True),
        "cpu_offload",
        "offload_optimizer",
    ),
    json_value_wrong=(lambda t: t.json.update(gradient_clipping="much"), "gradient_clipping", "much"),
    two_precisions=(
        lambda t: t.json.update(bf16={"enabled": True}, fp16={"enabled": True}),
        "bf16",
        "fp16",
        "keep one",
    ),
    micro_batch_absent=(
        lambda t: t.json.pop("train_micro_batch_size_per_gpu"),
        "train_micro_batch_size_per_gpu",
        "missing",
    ),
    train_batch_size=(
        lambda t: t.json.update(train_batch_size=10),
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    clipping_absent=(lambda t: t.json.pop("gradient_clipping"), "gradient_clipping", "missing"),
    optimizer_absent=(lambda t: t.json.pop("optimizer"), "optimizer", "missing"),
    batch_said_twice=(lambda t: t.run["optimization"].update(batch_size=99), "ds.json", "99", "10", "batch_size"),
    batch_said_nowhere=(
        lambda t: t.json.update(train_micro_batch_size_per_gpu="auto"),
        "train_micro_batch_size_per_gpu",
        "optimization.batch_size",
    ),
    fp16_on_cpu=(
        lambda t: t.json.update(bf16={"enabled": False}, fp16={"enabled": True}),
        "fp16",
        "not supported",
        "cpu",
    ),
    offload_without_stage=(
        lambda t: t.json["zero_optimization"].update(offload_param={"device": "cpu"}),
        "offload_param",
        "stage",
    ),
)


def write(t: Trial, name: str, text: str) -> str:
    (t.folder / name).write_text(text)
    return str(t.folder / name)


# Trajectories.
cases(
    data_folder_missing=(lambda t: t.vamp.update(train=["nowhere"]), "nowhere", "not a directory"),
    data_file_missing=(lambda t: (t.train / "nbr_dists.npy").unlink(), "missing .*nbr_dists.npy"),
    files_too_few=(lambda t: t.vamp.update(train=files(t)[:3]), "3 trajectory files", "4 needed"),
    files_in_wrong_order=(lambda t: t.vamp.update(train=[files(t)[i] for i in (0, 1, 3, 2)]), "nbr_dists.npy", "order"),
    distances_whole_numbers=(lambda t: t.change("nbr_dists", lambda a: a.astype(int)), "nbr_dists.npy", "int64"),
    neighbours_not_whole=(lambda t: t.change("nbr_lists", lambda a: a.astype(float)), "nbr_lists.npy", "float64"),
    shapes_differ=(lambda t: t.change("nbr_dists", lambda a: a[:, :, :3]), r"\(60, 6, 4\)", r"\(60, 6, 3\)"),
    frames_differ=(lambda t: t.change("nbr_dists", lambda a: a[:50]), r"\(60, 6, 4\)", r"\(50, 6, 4\)"),
    two_dimensions=(
        lambda t: [t.change(n, lambda a: a[0]) for n in ("nbr_lists", "nbr_dists")],
        r"\(6, 4\)",
        "frames, atoms",
    ),
    atoms_differ=(lambda t: t.save("atom_types", np.ones(5, int)), "6 atoms", "5"),
    no_frames=(
        lambda t: [t.change(n, lambda a: a[:0]) for n in ("nbr_lists", "nbr_dists")],
        "nbr_lists.npy",
        r"\(0, 6, 4\)",
        "a frame",
    ),
    no_neighbours=(
        lambda t: [t.change(n, lambda a: a[:, :, :0]) for n in ("nbr_lists", "nbr_dists")],
        "nbr_lists.npy",
        "neighbour",
    ),
    distance_nan=(lambda t: t.put("nbr_dists", (0, 2, 1), np.nan), "frame 0 of .*nbr_dists.npy", "not finite"),
    distance_infinite=(lambda t: t.put("nbr_dists", (7, 2, 1), np.inf), "frame 7 of .*nbr_dists.npy", "not finite"),
    distance_negative=(lambda t: t.put("nbr_dists", (5, 2, 1), -1.0), "frame 5 of .*nbr_dists.npy", "negative"),
    distance_nan_late=(lambda t: late(t, "nbr_dists", np.nan), "frame 59 of .*nbr_dists.npy", "not finite"),
    validation_nan_late=(
        lambda t: (t.put("nbr_dists", (-1, 2, 1), np.nan), t.swap_splits(), setattr(t, "checked_bytes", 1)),
        "frame 59 of .*train/nbr_dists.npy",
        "not finite",
    ),
    neighbour_out_of_range=(lambda t: t.put("nbr_lists", (3, 2, 1), 6), "frame 3 of .*nbr_lists.npy", "6 atoms"),
    neighbour_negative=(lambda t: t.put("nbr_lists", (3, 2, 1), -1), "frame 3 of .*nbr_lists.npy", "-1"),
    neighbour_out_of_range_late=(lambda t: late(t, "nbr_lists", 99), "frame 59 of .*nbr_lists.npy", "99"),
    target_out_of_range=(lambda t: t.save("target_index", [0, 6]), r"target_index\[1\] = 6", "6 atoms"),
    target_negative=(lambda t: t.save("target_index", [0, -1]), "target_index", "-1"),
    target_empty=(lambda t: t.save("target_index", np.zeros(0, int)), "target_index.npy", "no target"),
    target_not_whole=(lambda t: t.save("target_index", [0.5]), "target_index.npy", "float64"),
    atom_type_too_large=(lambda t: t.save("atom_types", np.full(6, 118)), "atom_types.npy", "118", r"0\.\.99"),
    tau_too_long=(lambda t: t.vamp.update(tau=60), "60 frames", "tau is 60"),
    tau_too_long_for_validation=(lambda t: t.vamp.update(tau=45), "validation", "40 frames", "tau is 45"),
    array_pickled=(lambda t: t.save("atom_types", np.array([{}], dtype=object)), "atom_types.npy", "pickle"),
    array_truncated=(
        lambda t: t.rewrite(t.train / "nbr_dists.npy", lambda b: b[:-100]),
        "nbr_dists.npy",
        "cannot be read",
    ),
    array_no_npy=(lambda t: (t.train / "nbr_dists.npy").write_text("1 2 3"), "nbr_dists.npy", "cannot be read"),
    array_empty_file=(lambda t: (t.train / "atom_types.npy").write_text(""), "atom_types.npy", "cannot be read"),
    array_is_a_folder=(
        lambda t: ((t.train / "atom_types.npy").unlink(), (t.train / "atom_types.npy").mkdir()),
        "atom_types.npy",
    ),
    directions_missing=(lambda t: t.vamp.update(model_type="ferro"), "atom_directions.npy", "ferro"),
    directions_shape=(lambda t: directions(t, np.zeros((60, 6, 2))), r"\(60, 6, 2\)", r"\(60, 6, 3\)"),
    directions_nan=(lambda t: directions(t, np.full((60, 6, 3), np.nan)), "atom_directions.npy", "not finite"),
    systems_differ=(
        lambda t: t.vamp.update(train=[str(t.train), str(write_trajectory(t.folder / "other", frames=20, atoms=7))]),
        "train and .*other|other and .*train",
        "one system",
    ),
    batch_too_large=(
        lambda t: t.json.update(train_micro_batch_size_per_gpu=100),
        "58 samples",
        "100",
        "lower the batch",
    ),
    rows_too_few=(lambda t: t.vamp.update(state_len=50), "50 states", "rows", "raise the batch"),
)


def files(t: Trial) -> list[str]:
    return [str(t.train / f"{name}.npy") for name in ("atom_types", "target_index", "nbr_lists", "nbr_dists")]


def late(t: Trial, name: str, value: float) -> None:
    """In the last frame, beyond those that are looked at before training. It is in one sample, so one rank meets it."""
    t.put(name, (-1, 2, 1), value)
    t.checked_bytes = 1
    t.json["train_micro_batch_size_per_gpu"] = 29


def directions(t: Trial, array: np.ndarray) -> None:
    t.vamp.update(model_type="ferro")
    t.save("atom_directions", array.astype(np.float32))


# The environment.
cases(
    env_world_of_four_alone=(lambda t: only(t, WORLD_SIZE="4"), "WORLD_SIZE=4", "Unset|torchrun"),
    env_rank_a_word=(lambda t: t.environ.update(RANK="two"), 'RANK="two"', "whole number"),
    env_rank_beyond_the_world=(lambda t: t.environ.update(RANK="5"), "RANK=5", "WORLD_SIZE=[12]"),
    env_port_impossible=(lambda t: t.environ.update(MASTER_PORT="99999"), "MASTER_PORT=99999", "65535"),
    env_launcher_unknown=(lambda t: t.environ.update(GDYN_LAUNCHER="slrum"), '"slrum"', "slurm"),
    run_dir_is_a_file=(lambda t: t.run_dir.write_text(""), "run_dir .*run", "cannot be written", "--run_dir"),
    run_dir_below_a_file=(
        lambda t: (write(t, "f", ""), t.argv.extend(["--run_dir", str(t.folder / "f/r")])),
        "f/r",
        "--run_dir",
    ),
)


def only(t: Trial, **environ: str) -> None:
    """One process that finds these variables and no others of a launcher."""
    t.environ |= (
        dict.fromkeys(("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")) | environ
    )


# Other people's weights, and checkpoints of a run that is already trained (`trained` in the name).
cases(
    init_from_missing=(lambda t: t.argv.extend(["--init_from", "nowhere"]), "init_from .*/nowhere", "does not exist"),
    init_from_pickle=(lambda t: t.argv.extend(["--init_from", pickled(t)]), "old.pth", "not a .safetensors"),
    init_from_other_network=(lambda t: t.argv.extend(["--init_from", other_weights(t)]), "w.safetensors", "do not fit"),
    init_from_glob_of_nothing=(
        lambda t: t.run.update(init_from={"lobe_7.*": other_weights(t)}),
        '"lobe_7.*" matches no weight',
        "the first are lobe_0",
    ),
    init_from_part_of_other_network=(
        lambda t: t.run.update(init_from={"lobe_0.*": other_weights(t)}),
        r'init_from {"lobe_0.\*": .*w.safetensors}',
        "do not fit",
        "and .* more",
        "Narrow the glob",
    ),
    init_from_list=(lambda t: t.run.update(init_from=["a"]), "init_from", "Expected a dict"),
    patience_zero=(lambda t: phases(t, patience=0), r"phases\[0\].patience = 0", "1 or more"),
    patience_a_word=(lambda t: phases(t, patience="long"), "patience", "long"),
    style_unknown=(lambda t: t.run.update(logging={"style": "line"}), "logging.style", "'lines'"),
    init_from_no_run=(lambda t: t.argv.extend(["--init_from", str(t.train)]), "train", "not a run folder"),
    resume_without_checkpoints=(
        lambda t: t.argv.extend(["--resume", "p0-vamp2-e0001"]),
        "p0-vamp2-e0001",
        "not a whole",
    ),
    trained_tag_unknown=(lambda t: t.argv.extend(["--resume", "p7-vamp9-e0000"]), "p7-vamp9-e0000", "not a whole"),
    trained_never=(lambda t: t.argv.extend(["--resume", "never"]), "--resume never", "--run_dir"),
    trained_corrupted=(lambda t: (damage(t), resume(t)), "weights.safetensors", "damaged", "another tag"),
    trained_all_corrupted=(lambda t: damage(t), "every checkpoint", "damaged"),
    trained_incomplete=(lambda t: ((t.checkpoint / "weights.safetensors").unlink(), resume(t)), "damaged", "missing"),
    trained_mark_foreign=(
        lambda t: ((t.checkpoint / "position.json").write_text("{}"), resume(t)),
        "position.json",
        "this program",
    ),
    trained_mark_broken=(
        lambda t: ((t.checkpoint / "position.json").write_text("{"), resume(t)),
        "position.json",
        "not valid JSON",
    ),
    trained_by_another_program=(lambda t: foreign(t), "other", "not a whole checkpoint"),
    trained_other_schedule=(lambda t: t.run.update(loss_schedule=["vamp1"]), "schedule mismatch", "vamp2", "vamp1"),
    trained_other_network=(
        lambda t: (t.vamp.update(atom_fea_len=6), t.run.update(loss_schedule=["vamp2", "vamp2"])),
        "do not fit",
    ),
    trained_other_stage=(
        lambda t: (t.json["zero_optimization"].update(stage=1), t.run.update(loss_schedule=["vamp2", "vamp2"])),
        "ZeRO stage 0",
        "--init_from",
    ),
)


def pickled(t: Trial) -> str:
    torch.save({"lobe_0_state_dict": {}}, t.folder / "old.pth")
    return str(t.folder / "old.pth")


def other_weights(t: Trial) -> str:
    save_file({"lobe_0.embedding.weight": torch.zeros(100, 3)}, t.folder / "w.safetensors")
    return str(t.folder / "w.safetensors")


def damage(t: Trial) -> None:
    for path in (t.run_dir / "checkpoints").glob("*/weights.safetensors"):
        t.rewrite(path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def resume(t: Trial) -> None:
    t.argv.extend(["--resume", t.checkpoint.name])


def foreign(t: Trial) -> None:
    folder = t.run_dir / "checkpoints" / "other"
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"anything")
    t.argv.extend(["--resume", "other"])


# Run files of the original GDyNet trainer.
cases(
    gdynet_key_unknown=(
        lambda t: gdynet(t, model={"state_length": 3}),
        "model.state_length",
        'Did you mean "state_len"',
    ),
    gdynet_section_unknown=(lambda t: gdynet(t, modell={}), '"modell"', 'Did you mean "model"'),
    gdynet_section_no_table=(lambda t: gdynet(t, model="small"), "model", "small"),
    gdynet_model_type_unknown=(lambda t: gdynet(t, model_type="gdynet_fero"), "gdynet_fero", "gdynet_ferro"),
    gdynet_schedule_unknown=(lambda t: gdynet(t, training={"loss_schedule": ["vamp3"]}), "vamp3", "vamp1, vamp2"),
    gdynet_without_data=(lambda t: gdynet(t, data={}), "data.train_fnames"),
    gdynet_number_no_number=(lambda t: gdynet(t, model={"learning_rate": "fast"}), "learning_rate", "fast"),
)


def gdynet(t: Trial, **changes: Any) -> None:
    data = {"train_fnames": [str(t.train)], "val_fnames": [str(t.folder / "validation")]}
    old = {"model_type": "gdynet_vanilla", "data": data, "output": {"folder": str(t.run_dir)}}
    t.run_file = yaml.safe_dump(old | changes)


# What only one rank sees; alone it sees nothing wrong.
cases(
    apart_data=(lambda t: apart(t, lambda: t.vamp.update(train=["train"])), r"\[rank 1\]", "elsewhere/train"),
    apart_recipe=(
        lambda t: apart(t, lambda: t.argv.extend(["--deepspeed", json_nearby(t)])),
        r"\[rank 1\]",
        "here.json",
    ),
    apart_run_file=(lambda t: apart(t, lambda: setattr(t, "config", Path("run.yaml"))), r"\[rank 1\]", "run.yaml"),
)


def json_nearby(t: Trial) -> str:
    """In rank 0's folder, but not beside the run file."""
    t.config = t.folder / "runs" / "run.yaml"
    return Path(write(t, "here.json", json.dumps(t.json))).name


def apart(t: Trial, spoil: Callable[[], Any]) -> None:
    t.apart = True
    spoil()


# Structures of proteins (`protein` in the name: the run is of the monodecoder).
cases(
    protein_file_missing=(lambda t: t.train.unlink(), "train.h5 is not a file", "HDF5"),
    protein_file_empty=(lambda t: t.train.write_bytes(b""), "train.h5 cannot be opened as HDF5"),
    protein_file_no_hdf5=(lambda t: t.train.write_text("ATOM"), "train.h5 cannot be opened as HDF5"),
    protein_file_truncated=(
        lambda t: t.rewrite(t.validation, lambda b: b[: len(b) // 2]),
        "validation.h5 cannot be opened as HDF5",
    ),
    protein_file_without_structures=(
        lambda t: without(t.train, "structs"),
        "train.h5 has no group /structs, but index",
        "gdyn prepare",
    ),
    protein_no_structures=(
        lambda t: (without(t.train, "index"), without(t.train, *identifiers(t.train))),
        "train.h5 holds no structures",
    ),
    protein_group_missing_late=(
        lambda t: t.store(t.train, "node/ss/x", None),
        "train.h5: structure protein0_0011: node/ss/x is missing",
    ),
    protein_coordinates_nan_late=(
        lambda t: t.store(t.validation, "node/coords/x", lambda a: np.where(np.arange(3) == 1, np.nan, a)),
        "validation.h5: structure protein1_0003: node/coords/x is not finite in row 0",
    ),
    protein_edges_out_of_range_late=(
        lambda t: t.store(t.train, "edge/res_contactPoints_res/edge_index", lambda a: a + 90),
        "structure protein0_0011: edge/res_contactPoints_res/edge_index is 9",
        r"expected residues 0\.\.",
    ),
    protein_plddt_percent=(
        lambda t: t.store(t.train, "node/plddt/x", lambda a: 100 * a),
        "protein0_0011: node/plddt/x",
        "divide confidences by 100",
    ),
    protein_widths_differ=(
        lambda t: [t.store(t.validation, "node/res/x", lambda a: a[:, :21], i) for i in range(4)],
        "engine.validation: .*validation.h5 has 21 features per residue",
        "is 26; prepare all files alike",
    ),
    protein_features_wrong=(
        lambda t: t.monodecoder.update(features=30),
        "engine.train: .*train.h5 has 26 features per residue",
        "is 30",
    ),
    protein_link_unknown=(
        lambda t: t.monodecoder.update(links=["contactpoints"]),
        "edge/res_contactpoints_res/edge_index is missing",
        "one of the links backbone, backbonerev, contactPoints",
    ),
    protein_foldx_nowhere=(
        lambda t: t.monodecoder.update(output_foldx=True),
        "engine.output_foldx is true",
        "no structure in .*train.h5",
    ),
    protein_compat=(
        lambda t: t.monodecoder.update(compat=True),
        "train.h5 was not written by foldtree2",
        "leave out compat",
    ),
    protein_too_large=(
        lambda t: t.monodecoder.update(max_residues=10),
        "protein0_00.. has the size 1[1-4]",
        "engine.max_residues = 10",
        "or leave these samples out",
    ),
    protein_batch_too_large=(
        lambda t: t.json.update(train_micro_batch_size_per_gpu=20),
        "12 samples",
        "lower the batch",
    ),
    protein_no_train_data=(lambda t: t.monodecoder.update(train=[]), "engine.train names no file"),
    protein_no_validation=(
        lambda t: (t.monodecoder.pop("validation"), t.monodecoder.update(validation_share=0.0)),
        "engine.validation names no file",
        "validation_share of 0.0 of 12 samples",
    ),
    protein_one_code=(lambda t: t.monodecoder.update(codes=1), "engine.codes = 1", "at least 2"),
    protein_one_width=(lambda t: t.monodecoder.update(hidden=[8]), r"engine.hidden = \[8\]", "at least 2"),
    protein_schedule_without_steps=(
        lambda t: t.monodecoder.update(commitment={"start": 0.1, "end": 0.9, "steps": 0}),
        "run.yaml: engine.commitment.steps",
        "0 does not",
    ),
    protein_shape_misspelt=(
        lambda t: t.monodecoder.update(weights={"edge": {"start": 1, "end": 0, "steps": 9, "shape": "cosin"}}),
        "run.yaml: engine.weights.edge.shape",
        "cosin",
        "cosine_with_restarts",
    ),
    protein_weight_negative=(
        lambda t: t.argv.extend(["--engine.weights.edge", "-0.1"]),
        "engine.weights.edge",
        r"v>=0. Found: -0\.1",
    ),
    protein_weight_misspelt=(
        lambda t: t.monodecoder.update(weights={"egde": 0.1}),
        "egde",
        'Did you mean "edge"',
    ),
    protein_dropout_too_large=(lambda t: t.monodecoder.update(dropout=1.5), "engine.dropout", "1.5"),
    protein_objective_of_another_engine=(
        lambda t: t.run.update(loss_schedule=["vamp2"]),
        '"vamp2"; Monodecoder knows loss',
    ),
    protein_muon_without_matrices=(
        lambda t: (
            t.monodecoder.update(encoder="mk1_muon"),
            t.run.update(deepspeed="fp32_zero1_muon", optimization={"batch_size": 3, "gradient_accumulation_steps": 1}),
            t.run.pop("loss_schedule"),
            t.run.pop("epochs"),
            t.run.update(phases=[{"objective": "loss", "epochs": 1, "trains": ["decoders.*"]}]),
        ),
        "is Muon, but this phase trains none of the matrices",
    ),
    trained_protein_other_network=(
        lambda t: (t.monodecoder.update(embedding_dim=6), t.run.update(loss_schedule=["loss", "loss"])),
        "do not fit",
    ),
    trained_evaluate_protein_no_data=(
        lambda t: call(t, "evaluate", t.run_dir, "--data", "nowhere.h5"),
        "nowhere.h5 is not a file",
    ),
    trained_encode_protein_too_few_letters=(
        lambda t: call(t, "encode", t.run_dir, t.train, "--output", t.folder / "a.fasta"),
        "70 codes",
        "64",
    ),
    trained_encode_protein_other_features=(
        lambda t: (
            [t.store(t.validation, "node/res/x", lambda a: a[:, :21], i) for i in range(4)],
            call(t, "encode", t.run_dir, t.validation, "--output", t.folder / "a.txt", "--alphabet", "foldtree2"),
        ),
        "validation.h5 have 21 features",
        "trained on 26",
    ),
    apart_protein_file=(
        lambda t: apart(t, lambda: t.monodecoder.update(train=["train.h5"], features=26)),
        r"\[rank 1\]",
        "elsewhere/train.h5",
    ),
)


def identifiers(path: Path) -> list[str]:
    with h5py.File(path) as file:
        return [f"structs/{name}" for name in file["structs"]]


def without(path: Path, *names: str) -> None:
    with h5py.File(path, "a") as file:
        for name in names:
            del file[name]


# The other programs.
cases(
    evaluate_no_run=(lambda t: call(t, "evaluate", t.train, "--data", t.train), "train", "not a run folder"),
    trained_evaluate_no_data=(
        lambda t: call(t, "evaluate", t.run_dir, "--data", "nowhere"),
        "nowhere",
        "not a directory",
    ),
    trained_evaluate_no_checkpoint=(
        lambda t: call(t, "evaluate", t.run_dir, "--data", t.train, "--checkpoint", "p9"),
        "p9",
        "not a whole",
    ),
    trained_evaluate_damaged=(lambda t: (damage(t), call(t, "evaluate", t.run_dir, "--data", t.train)), "damaged"),
    evaluate_without_data=(lambda t: call(t, "evaluate", t.run_dir), "data"),
    analyze_no_run=(lambda t: call(t, "analyze", "nowhere"), "nowhere", "not a run folder"),
    trained_analyze_split_absent=(lambda t: call(t, "analyze", t.run_dir, "--split", "test"), "test"),
    analyze_split_unknown=(lambda t: call(t, "analyze", t.run_dir, "--split", "tset"), "tset", "test"),
    encode_no_run=(lambda t: call(t, "encode", t.train, "a.pdb", "--output", "a.fasta"), "train", "not a run folder"),
    trained_encode_no_alphabet=(
        lambda t: call(t, "encode", t.run_dir, "a.pdb", "--output", "a.fasta"),
        "Vamp learns no alphabet",
    ),
    export_no_run=(lambda t: call(t, "export", t.train), "train", "not a run folder"),
    prepare_input_missing=(
        lambda t: call(t, "prepare", "trajectories", "no.npz", "--output", t.folder / "p"),
        "no.npz",
    ),
    prepare_option_unknown=(lambda t: call(t, "prepare", "trajectories", "no.npz", "--neigbours", "3"), "neigbours"),
    prepare_check_nothing=(lambda t: call(t, "prepare", "check", t.folder / "nowhere"), "nowhere", "not a directory"),
)


def call(t: Trial, program: str, *argv: Any) -> None:
    t.program, t.argv = program, [str(word) for word in argv]
