"""The VAMP-2 loss with its gradient: float64 from additive statistics, against deeptime's, in float32 and by autograd;
and its share of a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from deeptime.decomposition.deep import vamp_score

from benchmarks.gdynet import GDYN_STEPS, Arms
from benchmarks.measure import Finding, finding, interleave, ratios
from benchmarks.workload import SMALL, vamp2_loss

ROWS = 640
"""32 frames with 20 targets."""
CALLS = 100
"""Per round."""
SHARE = 3.0
"""Of a training step, %."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run(rounds: int) -> list[Finding]:
    findings = []
    for states in (4, 10, 32):
        x, y = probabilities(states)
        check(x, y)
        seconds = interleave({"gdyn": calls(vamp2_loss, x, y), "deeptime": calls(deeptime_loss, x, y)}, rounds)
        micro = {name: [1e6 * s / CALLS for s in values] for name, values in seconds.items()}
        findings.append(finding(f"S {states}: gdyn, float64", micro["gdyn"], "us"))
        findings.append(finding(f"S {states}: deeptime, float32", micro["deeptime"], "us"))
        findings.append(finding(f"S {states}: deeptime / gdyn", ratios(micro["deeptime"], micro["gdyn"]), "x"))
    x, y = probabilities(10)
    with Arms(SMALL) as arms:
        seconds = interleave({"loss": calls(vamp2_loss, x, y), "step": arms.train_gdyn}, rounds)
    shares = [100 * GDYN_STEPS / CALLS * share for share in ratios(seconds["loss"], seconds["step"])]
    return [*findings, finding(f"S 10: share of a step of {SMALL}", shares, "%", ceiling=SHARE)]


def probabilities(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two leaves (rows, states): a process that is slow, and noise."""
    generator = torch.Generator().manual_seed(0)
    slow = torch.randn(ROWS, states, generator=generator)
    x, y = ((slow + 0.5 * torch.randn(ROWS, states, generator=generator)).softmax(-1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def deeptime_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = -vamp_score(x, y, method="VAMP2", mode="trunc", epsilon=1e-6)
    return loss


def calls(loss: Loss, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Loss and gradient, CALLS times."""

    def arm() -> None:
        for _ in range(CALLS):
            x.grad = y.grad = None
            loss(x, y).backward()

    return arm


def check(x: torch.Tensor, y: torch.Tensor) -> None:
    """Both have one gradient, with deeptime's algebra in float64, too."""
    (ours,) = torch.autograd.grad(vamp2_loss(x, y), x)
    doubles = [p.detach().double().requires_grad_() for p in (x, y)]
    (theirs,) = torch.autograd.grad(deeptime_loss(*doubles), doubles[0])
    # Probabilities cannot move along (1, ..., 1), where the gradients may differ.
    ours, theirs = (gradient - gradient.mean(-1, keepdim=True) for gradient in (ours, theirs))
    error = float((ours - theirs).norm() / theirs.norm())
    if error > 1e-5:
        raise AssertionError(f"the gradients differ by {error:.1e}")
