"""Parameter groups: which parameters an optimizer treats alike, and Muon for those an engine calls its matrices.

Muon orthogonalises the momentum of a weight matrix (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).
Which matrices are meant for it is a fact of the network, so an engine may say it; rates and other numbers are the
DeepSpeed JSON's. DeepSpeed alone would choose by shape and name: every parameter of two dimensions or more, whose name
has no "embed" and no "lm_head".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gdyn import ds_config
from gdyn.ds_config import Values
from gdyn.errors import UserError

Groups = list[dict[str, Any]]


def param_groups(model: nn.Module, wanted: Groups | None, values: Values, phase: str) -> Groups:
    """The groups an engine wants, as far as they are trained: without frozen parameters, and `use_muon` only where the
    optimizer is Muon. `phase` is for messages.

    Raises: UserError if the engine names its matrices, and this phase trains none of them with Muon.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    muon = ds_config.optimizer_type(values) == "Muon"
    groups = []
    for group in wanted or [{"params": trained}]:
        parameters = [parameter for parameter in group["params"] if parameter.requires_grad]
        rest = {name: value for name, value in group.items() if name != "params" and (muon or name != "use_muon")}
        if parameters:
            groups.append({"params": parameters, **rest})
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, trained)), "param_groups must hold every trained parameter once"
    if not names_matrices(groups):
        return groups
    matrices = [parameter for group in groups if group.get("use_muon") for parameter in group["params"]]
    if not matrices:
        raise UserError(
            f"phase {phase}: the optimizer of the DeepSpeed JSON is Muon, but this phase trains none of the matrices "
            "the engine means for it; choose a recipe with AdamW."
        )
    assert all(matrix.ndim == 2 for matrix in matrices), "Muon is for matrices"
    return [{"use_muon": False, **group} for group in groups]


def names_matrices(groups: Groups) -> bool:
    """Whether the engine has said which parameters are for Muon."""
    return any("use_muon" in group for group in groups)


def described(groups: Groups) -> str:
    """One line for the log, e.g. `body: 12 matrices with Muon, 1,200,000 parameters; rest: 30 tensors, 4,000
    parameters`."""
    lines = []
    for i, group in enumerate(groups):
        kind = "matrices with Muon" if group.get("use_muon") else "tensors"
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"{name_of(group, i)}: {len(group['params'])} {kind}, {numbers:,} parameters")
    return "; ".join(lines)


def name_of(group: dict[str, Any], index: int) -> str:
    return str(group.get("name") or index)


def muon(values: Values) -> Callable[[Groups], torch.optim.Optimizer]:
    """What `deepspeed.initialize` takes as `optimizer`: from groups with `use_muon` to DeepSpeed's Muon, whose other
    groups get PyTorch's AdamW. What a group says itself overrides the JSON."""
    params = dict(ds_config.get(values, "optimizer.params", {}))
    common = {
        name: params[name] for name in ("weight_decay", "eps", "betas", "momentum", "ns_method") if name in params
    }
    rates = {use: params.get("muon_lr" if use else "adam_lr", params.get("lr")) for use in (True, False)}
    decoupled = params.get("adam_w_mode", True)

    def build(groups: Groups) -> torch.optim.Optimizer:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # slow to import

        settings = []
        for group in groups:
            use = bool(group["use_muon"])
            for parameter in group["params"]:
                parameter.use_muon = use  # overwrites what deepspeed.initialize has just guessed
            unused = ("betas", "eps") if use else ("momentum", "ns_method")
            own = {name: value for name, value in common.items() if name not in unused}
            settings.append(own | ({} if rates[use] is None else {"lr": rates[use]}) | group)
        adam = torch.optim.AdamW if decoupled else torch.optim.Adam
        return MuonWithAuxAdam(settings, adam_optimizer=adam, adam_w_mode=decoupled)

    return build


def run_muon_eagerly() -> None:
    """Take DeepSpeed's Muon out of torch.compile. There it needs a C++ compiler, 40 s on a CPU in the first step, and
    is compiled anew for other shapes, so that a resumed run rounds differently."""
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for module in (original_muon, muon_optimizer):
        for name in ("muon_update", "zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz"):
            if hasattr(module, name):
                setattr(module, name, inspect.unwrap(getattr(module, name)))
