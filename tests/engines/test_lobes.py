"""The dense lobe is the edge-list formula of GDyNet, written out in plain PyTorch here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.engines.vamp.lobes import Lobe, Lobes
from gdyn.nn.gaussians import expand_distances
from gdyn.nn.norm import BatchNorm

B, N, M, A, G, K, CUTOFF = 3, 9, 4, 8, 10, 3, 6.0
NORMS = ("atom", "batch")
MODELS = [
    pytest.param(norm, ferro, id=f"{norm}, {'ferro' if ferro else 'vanilla'}") for norm in NORMS for ferro in (0, 1)
]


def make_lobe(norm: str = "atom", ferro: bool = False, layers: int = 2) -> Lobe:
    """With every parameter random, so that a forgotten bias shows."""
    torch.manual_seed(0)
    lobe = Lobe(K, A, layers, CUTOFF, G, norm, bool(ferro))  # type: ignore[arg-type]
    for parameter in lobe.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return lobe


def make_frames(ferro: bool = True, seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    frames = {
        "atom_types": torch.randint(0, 100, (N,), generator=random),
        "target_index": torch.tensor([5, 0, 7]),
        "nbr_lists": torch.randint(0, N, (B, N, M), generator=random, dtype=torch.int32),
        "nbr_dists": 1 + 5 * torch.rand(B, N, M, generator=random),
    }
    return frames | ({"atom_directions": torch.randn(B, N, 3, generator=random)} if ferro else {})


def edge_list_forward(lobe: Lobe, frames: dict[str, Tensor]) -> Tensor:
    """The formula, on a graph of all frames: nodes (B N, A), edges (2, B N M), no neighbour tensors."""
    offsets = N * torch.arange(B)
    source = (frames["nbr_lists"] + offsets[:, None, None]).reshape(-1).long()
    centre = torch.arange(B * N).repeat_interleave(M)
    centres = torch.linspace(0, CUTOFF, G)
    width = centres[1] - centres[0]
    e = torch.exp(-((frames["nbr_dists"].reshape(-1, 1) - centres) ** 2) / (2 * width**2))
    h = lobe.embedding(frames["atom_types"].repeat(B))
    if lobe.directions is not None:
        h = h + lobe.directions(frames["atom_directions"].reshape(-1, 3))
    for layer in lobe.convolutions:
        z = torch.cat([h[centre], h[source], e], 1)
        core = F.relu(normalised(layer.norm_edges, layer.core(z)))
        weight = torch.exp(layer.score(z))
        share = weight / torch.zeros(B * N, 1).index_add(0, centre, weight)[centre]
        aggregate = torch.zeros(B * N, A).index_add(0, centre, share * core) / M
        h = F.relu(normalised(layer.norm_atoms, aggregate) + h)
    h = h[(offsets[:, None] + frames["target_index"]).flatten()]
    h = F.relu(lobe.hidden(F.relu(h)))
    return lobe.readout(h).softmax(1).view(B, -1, K)


def normalised(norm: nn.Module, rows: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(rows, rows.shape[1:], norm.weight, norm.bias)
    running = (norm.running_mean.clone(), norm.running_var.clone())
    return F.batch_norm(rows, *running, norm.weight, norm.bias, training=norm.training)  # type: ignore[arg-type]


def output_and_gradients(forward, lobe: Lobe, frames: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    lobe.zero_grad()
    out = forward(frames)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in lobe.named_parameters()}


def assert_gradients_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        mine = found[name]
        assert mine is not None and gradient is not None, f"{name} gets no gradient"
        torch.testing.assert_close(
            mine, gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("norm", "ferro"), MODELS)
def test_lobe_is_the_edge_list_formula_in_value_and_gradient(norm, ferro, layers) -> None:
    lobe, frames = make_lobe(norm, ferro, layers), make_frames(ferro)
    expected, slopes = output_and_gradients(lambda f: edge_list_forward(lobe, f), lobe, frames)
    found, mine = output_and_gradients(lobe, lobe, frames)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_gradients_close(mine, slopes)


@pytest.mark.parametrize(("norm", "ferro"), MODELS)
def test_an_evaluated_lobe_is_the_edge_list_formula(norm, ferro) -> None:
    """In eval mode, with running statistics that training has moved."""
    lobe = make_lobe(norm, ferro)
    lobe(make_frames(ferro, seed=3))
    lobe.eval()
    frames = make_frames(ferro)
    with torch.no_grad():
        torch.testing.assert_close(lobe(frames), edge_list_forward(lobe, frames), rtol=0, atol=1e-5)


def test_batch_statistics_move_as_torchs_but_not_without_gradients() -> None:
    ours, reference = BatchNorm(A), nn.BatchNorm1d(A)
    rows = torch.randn(50, A, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours(rows)
    reference(rows)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    with torch.no_grad():
        ours(rows)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)


@pytest.mark.parametrize(("norm", "ferro"), MODELS)
def test_states_of_some_targets_are_those_of_all_atoms_picked(norm, ferro) -> None:
    """Whatever is saved by evaluating the last layer at the targets alone must not show, in gradients neither."""
    lobe, frames = make_lobe(norm, ferro), make_frames(ferro)
    everyone = frames | {"target_index": torch.arange(N)}
    found, mine = output_and_gradients(lobe, lobe, frames)
    expected, slopes = output_and_gradients(lambda f: lobe(f)[:, frames["target_index"]], lobe, everyone)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert_gradients_close(mine, slopes)


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_neighbours_does_not_matter(norm) -> None:
    lobe, frames = make_lobe(norm), make_frames()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    shuffled = frames | {name: frames[name][..., order] for name in ("nbr_lists", "nbr_dists")}
    torch.testing.assert_close(lobe(shuffled), lobe(frames), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_renumbering_the_atoms_does_not_matter(norm) -> None:
    lobe, frames = make_lobe(norm, ferro=True), make_frames()
    old = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    new = torch.argsort(old)
    renumbered = {
        "atom_types": frames["atom_types"][old],
        "target_index": new[frames["target_index"]],
        "nbr_lists": new[frames["nbr_lists"].long()][:, old].int(),
        "nbr_dists": frames["nbr_dists"][:, old],
        "atom_directions": frames["atom_directions"][:, old],
    }
    torch.testing.assert_close(lobe(renumbered), lobe(frames), rtol=0, atol=1e-6)


def test_with_the_norm_per_atom_a_frame_does_not_see_its_batch() -> None:
    lobe, frames = make_lobe("atom"), make_frames(ferro=False)
    whole = lobe(frames)
    for i in range(B):
        alone = {name: t if name in ("atom_types", "target_index") else t[i : i + 1] for name, t in frames.items()}
        torch.testing.assert_close(lobe(alone)[0], whole[i], rtol=0, atol=1e-6)


def test_outputs_are_float32_probabilities_frame_by_target() -> None:
    out = make_lobe()(make_frames())
    assert out.shape == (B, 3, K)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(-1), torch.ones(B, 3))


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_gives_nearly_the_same_in_float32(norm) -> None:
    """As autocast, and with the parameters themselves in bfloat16."""
    lobe, frames = make_lobe(norm), make_frames()
    exact = lobe(frames).detach()
    with torch.autocast("cpu", torch.bfloat16):
        automatic, slopes = output_and_gradients(lobe, lobe, frames)
    halved = lobe.bfloat16()(frames)
    for found in (automatic, halved):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in slopes.values())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("ferro", "expected"), [(False, 46_883), (True, 47_139)])
def test_a_default_lobe_has_the_originals_number_of_parameters(norm, ferro, expected) -> None:
    lobe = Lobe(states=10, features=64, convolutions=3, cutoff=6.0, gaussians=50, norm=norm, ferro=ferro)
    assert sum(parameter.numel() for parameter in lobe.parameters()) == expected


def test_convolutions_start_xavier_uniform_without_bias() -> None:
    lobe = Lobe(states=10, features=64, convolutions=3, cutoff=6.0, gaussians=50, norm="atom", ferro=False)
    for layer in lobe.convolutions:
        for linear in (layer.core, layer.score):
            assert not linear.bias.any()
            bound = (6 / sum(linear.weight.shape)) ** 0.5
            assert 0.9 * bound < linear.weight.abs().max().item() <= bound


def test_gaussians_of_a_distance() -> None:
    found = expand_distances(torch.tensor([2.5]), cutoff=6.0, count=50)[0]
    expected = torch.tensor([0.053926, 0.366604, 0.916855, 0.843548, 0.285512, 0.035550])
    torch.testing.assert_close(found[18:24], expected, rtol=0, atol=2e-6)
    assert found.dtype == torch.float32


def test_gaussians_stand_from_zero_to_the_cutoff() -> None:
    centres = torch.linspace(0, 7, 36)
    found = expand_distances(torch.cat([centres, torch.tensor([1e6])]), cutoff=7.0, count=36)
    torch.testing.assert_close(found[:36].diagonal(), torch.ones(36))
    assert float(found[36].max()) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_lobes_start_equal_and_only_shared_ones_stay_so(shared) -> None:
    lobes, frames = Lobes(make_lobe(), shared), make_frames()
    pairs = {name: t if name in ("atom_types", "target_index") else torch.cat([t, t]) for name, t in frames.items()}
    x, y = lobes(pairs)
    assert x.shape == (B, 3, K)
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(x, lobes.lobe_0(frames))
    lobes.lobe_0.readout.bias.data[0] += 1
    x, y = lobes(pairs)
    assert torch.allclose(x, y) == shared
