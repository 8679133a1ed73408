"""The monodecoder's network: its layers against NumPy, PyTorch Geometric and PyTorch; structures do not see each
other."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import TransformerConv

from gdyn.engines.monodecoder.autoencoder import Autoencoder
from gdyn.engines.monodecoder.decoders import Decoders, angle, divisor
from gdyn.engines.monodecoder.encoder import Encoder, Features
from gdyn.engines.monodecoder.layers import ChainConvolutions, GraphAttention, SelfAttention, neighbours, positions_of
from tests.proteins import FEATURES, structure

Batch = dict[str, Tensor]
LINKS = ("contactPoints", "backbone")
LENGTHS = (31, 1, 90, 12)
"""A chain without neighbours, and one that is longer than the rest together."""


class Rounding(nn.Module):
    """The quantizer's interface, without its codebook: every number to the nearest quarter."""

    def forward(self, x_rd: Tensor) -> tuple[Tensor, Tensor]:
        quantized = (4 * x_rd.detach()).round() / 4
        return quantized, (4 * quantized).long().sum(1) % 7


def arrays(residues: int) -> dict[str, np.ndarray]:
    return structure(residues, np.random.default_rng(residues))


def collate(lengths: Sequence[int] = LENGTHS) -> Batch:
    """A batch of structures that are functions of their lengths, with the keys of `Structures`."""
    names = {"features": ("res",), "amino_acids": ("AA",), "spectra": ("fourier1dr", "fourier1di")}
    parts = [arrays(residues) for residues in lengths]
    batch = {
        key: np.concatenate([np.concatenate([of[f"node/{name}/x"] for name in own], 1) for of in parts])
        for key, own in names.items()
    }
    starts = np.cumsum([0, *lengths])
    for link in LINKS:
        edges = [of[f"edge/res_{link}_res/edge_index"] + s for of, s in zip(parts, starts[:-1], strict=True)]
        batch[f"edges_{link}"] = np.concatenate(edges, 1)
    return {name: torch.from_numpy(array) for name, array in batch.items()} | {"lengths": torch.tensor(lengths)}


def pairs_of(lengths: Sequence[int]) -> Tensor:
    """Three pairs of residues in every structure, (2, 3 B)."""
    own = (np.array([[0, n // 2, n - 1], [n // 3, 0, n // 4]]) for n in lengths)
    return torch.from_numpy(np.concatenate([start + of for start, of in zip(starts(lengths), own, strict=True)], 1))


def starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def make(dropout: float = 0.0, checkpoint: bool = False, hidden: Sequence[int] = (16, 24, 20)) -> Autoencoder:
    torch.manual_seed(0)
    network = Autoencoder(
        Encoder(FEATURES, hidden, 3, 8, LINKS, dropout, checkpoint),
        Rounding(),
        Decoders(8, 20, 5, dropout, spectrum=True, foldx=True, checkpoint=checkpoint, feed_forward=32),
    )
    for parameter in network.parameters():  # no bias is 0, no gain 1
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def run(network: Autoencoder, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    return network(collate(lengths), pairs_of(lengths))


def rows_of(outputs: dict[str, Tensor], lengths: Sequence[int], which: int) -> dict[str, Tensor]:
    """What `run` says of one structure."""
    start, end = starts(lengths)[which], starts(lengths)[which] + lengths[which]
    cuts = {sum(lengths): slice(start, end), len(lengths): slice(which, which + 1)}
    cuts[3 * len(lengths)] = slice(3 * which, 3 * which + 3)
    return {name: tensor[cuts[len(tensor)]] for name, tensor in outputs.items()}


def some_loss(outputs: dict[str, Tensor]) -> Tensor:
    """A number to which every output contributes."""
    return sum(
        (tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).tanh().sum()
        for tensor in outputs.values()
        if tensor.requires_grad
    )  # type: ignore[return-value]


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(network.parameters())), strict=True))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def test_outputs_have_the_shapes_of_the_contract() -> None:
    residues, structures, pairs = sum(LENGTHS), len(LENGTHS), 3 * len(LENGTHS)
    outputs = run(make())
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {
        "encoded": (residues, 8),
        "quantized": (residues, 8),
        "codes": (residues,),
        "aa_logits": (residues, 20),
        "ss_logits": (residues, 3),
        "angles": (residues, 3),
        "contact_logits": (pairs,),
        "distance_logits": (pairs, 8),
        "spectrum_2d": (structures, 2600),
        "foldx": (structures, 23),
    }
    assert all(tensor.dtype == torch.float32 for name, tensor in outputs.items() if name != "codes")
    assert outputs["encoded"].abs().max() < 1 and outputs["angles"].abs().max() <= math.pi


def test_codes_are_those_of_a_forward_pass() -> None:
    network = make()
    assert torch.equal(network.encode(collate()), run(network)["codes"])


def test_networks_parts_are_named_input_body_and_head() -> None:
    prefixes = {".".join(name.split(".")[:3]) for name, _ in make().named_parameters()}
    parts = {f"{of}.{part}" for of in ("decoders.sequence", "decoders.geometry") for part in ("input", "body", "head")}
    assert {name for name in prefixes if name.split(".")[1] in ("sequence", "geometry")} == parts
    assert {name.split(".")[1] for name in prefixes if name.startswith("encoder")} == {"input", "body", "head"}


def test_graph_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    layer, heads, c_in, c_out = GraphAttention(4, 6, 2, 0.0), 2, 4, 6
    edges = np.array([[1, 2, 0, 2, 0, 0], [0, 0, 1, 1, 2, 2]])  # row 3 has no neighbour, the last edge is double
    x = np.random.default_rng(0).normal(size=(4, c_in))
    of = numbers(layer)
    query = (x @ of["lin_query.weight"].T + of["lin_query.bias"]).reshape(4, heads, c_out)
    key, value = ((x @ of[f"lin_{name}.weight"].T).reshape(4, heads, c_out) for name in ("key", "value"))
    expected = x @ of["lin_skip.weight"].T + of["lin_skip.bias"]
    for i, h in np.ndindex(3, heads):
        sources = edges[0, edges[1] == i]
        weights = np.exp(key[sources, h] @ query[i, h] / math.sqrt(c_out))
        expected[i] += weights @ value[sources, h] / weights.sum() / heads
    found = layer(torch.from_numpy(x).float(), *neighbours(torch.from_numpy(edges), 4))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)


def test_graph_attention_is_transformer_conv_but_for_the_biases_of_keys_and_values() -> None:
    torch.manual_seed(0)
    batch, width, out = collate(), FEATURES, 10
    edges, x = batch["edges_contactPoints"], batch["features"]
    original = TransformerConv(width, out, 4, concat=False)
    original.lin_key.bias.data.zero_()
    original.lin_value.bias.data.zero_()
    ours = GraphAttention(width, out, 4, 0.0)
    ours.load_state_dict(
        {name: w for name, w in original.state_dict().items() if name not in ("lin_key.bias", "lin_value.bias")}
    )
    torch.testing.assert_close(ours(x, *neighbours(edges, len(x))), original(x, edges), rtol=1e-4, atol=1e-5)


def test_edges_point_from_source_to_target() -> None:
    index, mask = neighbours(torch.tensor([[5, 2, 3], [0, 1, 0]]), 3)
    assert [index[i][mask[i]].tolist() for i in range(3)] == [[5, 3], [2], []]


@pytest.mark.parametrize("train", [True, False])
def test_self_attention_is_pytorchs_layer_on_every_structure(train: bool) -> None:
    torch.manual_seed(0)
    width, lengths = 12, (5, 1, 9)
    original = nn.TransformerEncoderLayer(width, 3, 20, 0.0, batch_first=True).train(train)
    ours = SelfAttention(width, 3, 20, 0.0).train(train)
    mixing = original.self_attn
    for parameter in original.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for i, linear in enumerate((ours.query, ours.key, ours.value)):
        linear.weight.data = mixing.in_proj_weight.data[i * width : (i + 1) * width]
        if linear.bias is not None:
            linear.bias.data = mixing.in_proj_bias.data[i * width : (i + 1) * width]
    for mine, theirs in (
        (ours.out, mixing.out_proj),
        (ours.norm_attention, original.norm1),
        (ours.norm_feed_forward, original.norm2),
        (ours.feed_forward[0], original.linear1),
        (ours.feed_forward[3], original.linear2),
    ):
        mine.load_state_dict(theirs.state_dict())
    x = torch.randn(sum(lengths), width)
    expected = torch.cat([original(chain[None])[0] for chain in x.split(lengths)])
    torch.testing.assert_close(ours(x, torch.tensor(lengths)), expected, rtol=1e-4, atol=1e-5)


def test_chain_convolutions_are_conv1d_on_every_chain() -> None:
    torch.manual_seed(0)
    lengths = (1, 7, 2)
    ours = ChainConvolutions(4, 6, 3)
    x = torch.randn(sum(lengths), 4)
    expected = []
    for chain in x.split(lengths):
        for linear, norm in zip(ours.linears, ours.norms, strict=True):
            kernel = linear.weight.unflatten(1, (3, -1)).transpose(1, 2)  # type: ignore[operator]
            convolved = F.conv1d(chain.T[None], kernel, linear.bias, padding=1)  # type: ignore[arg-type]
            chain = norm(F.gelu(convolved[0].T))
        expected.append(chain)
    begins = torch.tensor([False, False, *[True] * 6, False, True])
    torch.testing.assert_close(ours(x, begins), torch.cat(expected))


def test_features_are_their_formula() -> None:
    torch.manual_seed(0)
    module, batch = Features(FEATURES, 5, 0.0, positions=True, spectra=True), collate((4, 3))
    of = numbers(module)
    place = np.array([0, 1, 2, 3, 0, 1, 2])[:, None]
    phases = place * 10.0 ** (-np.arange(0, 256, 2) / 256)
    positions = np.stack([np.sin(phases), np.cos(phases)], 2).reshape(7, 256)
    np.testing.assert_allclose(positions_of(batch["lengths"]).numpy(), positions, atol=1e-6)

    def block(x: np.ndarray, name: str) -> np.ndarray:
        h = layer_norm(x)
        for layer in (2, 5):
            h = layer_norm(gelu(h @ of[f"{name}.{layer}.weight"].T + of[f"{name}.{layer}.bias"]))
        return h

    residues = np.concatenate([layer_norm(batch["features"].double().numpy()), positions], 1)
    expected = block(residues, "residues") + block(batch["spectra"].double().numpy(), "spectra")
    np.testing.assert_allclose(module(batch, torch.float32).detach().numpy(), expected, atol=1e-5)


def test_positions_and_spectra_can_be_left_out() -> None:
    batch = collate()
    plain = Encoder(FEATURES, (16, 16), 2, 8, LINKS, 0.0, positions=False, spectra=False)
    del batch["spectra"]
    assert plain(batch).shape == (sum(LENGTHS), 8)


@pytest.mark.parametrize("which", range(len(LENGTHS)))
def test_a_structure_does_not_see_its_batch_mates(which: int) -> None:
    """In its outputs, nor in what it adds to the gradient. Relative to each gradient's own size, so a parameter that
    only gets rounding noise would show."""
    network = make()
    together, alone = rows_of(run(network), LENGTHS, which), run(network, [LENGTHS[which]])
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-5)
    expected = gradients(network, some_loss(alone))
    for name, found in gradients(network, some_loss(together)).items():
        # Where there is nothing to choose among, attention has no gradient.
        size = float(expected[name].norm()) or 1e-2
        assert float((found - expected[name]).norm()) <= 1e-4 * size, name


def test_order_of_structures_is_the_order_of_outputs() -> None:
    network, order = make(), (2, 0, 3, 1)
    shuffled = [LENGTHS[i] for i in order]
    here, there = run(network), run(network, shuffled)
    for place, which in enumerate(order):
        moved = rows_of(there, shuffled, place)
        for name, tensor in rows_of(here, LENGTHS, which).items():
            torch.testing.assert_close(moved[name], tensor, rtol=1e-5, atol=1e-5)


def test_training_and_evaluation_agree() -> None:
    network = make()
    trained = run(network.train())
    with torch.no_grad():
        evaluated = run(network.eval())
    for name, tensor in trained.items():
        torch.testing.assert_close(evaluated[name], tensor.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_number(dropout: float) -> None:
    found = []
    for checkpoint in (False, True):
        network = make(dropout, checkpoint)
        torch.manual_seed(1)
        outputs = run(network)
        found.append(outputs | gradients(network, some_loss(outputs)))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_dropout_drops() -> None:
    network = make(dropout=0.3)
    first, second = run(network), run(network)
    for name in ("encoded", "aa_logits", "ss_logits", "angles"):
        assert not torch.allclose(first[name], second[name])


def test_every_parameter_gets_a_gradient() -> None:
    network = make()
    found = gradients(network, some_loss(run(network)))
    without = {name for name, gradient in found.items() if float(gradient.abs().max()) == 0}
    # One residue comes before each: nothing to choose among.
    backbone = LINKS.index("backbone")
    choosing = (f"links.{backbone}.lin_query", f"links.{backbone}.lin_key")
    assert {name for name in without if not any(part in name for part in choosing)} == set()


def test_decoders_gradient_passes_straight_through_the_quantizer() -> None:
    network = make()
    outputs = run(network)
    assert not outputs["quantized"].requires_grad
    through = torch.autograd.grad(outputs["aa_logits"].square().sum(), outputs["encoded"])[0]
    z = outputs["quantized"].requires_grad_()
    logits = network.decoders(z, torch.tensor(LENGTHS), pairs_of(LENGTHS))["aa_logits"]
    torch.testing.assert_close(logits, outputs["aa_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(through, torch.autograd.grad(logits.square().sum(), z)[0], rtol=1e-4, atol=1e-5)


def test_lonely_residue_and_empty_batches_of_edges_and_pairs_are_finite() -> None:
    network = make()
    batch = collate((1, 1))
    assert not any(batch[f"edges_{link}"].numel() for link in LINKS)
    outputs = network(batch, torch.zeros(2, 0, dtype=torch.int64))
    assert outputs["contact_logits"].shape == (0,)
    assert all(torch.isfinite(tensor).all() for tensor in outputs.values())
    assert all(torch.isfinite(g).all() for g in gradients(network, some_loss(outputs)).values())


def test_contacts_and_distances_are_symmetric() -> None:
    network, pairs = make(), pairs_of(LENGTHS)
    there, back = (network(collate(), of) for of in (pairs, pairs.flip(0)))
    for name in ("contact_logits", "distance_logits"):
        torch.testing.assert_close(there[name], back[name])
        assert there[name].std(0).min() > 0


def test_contact_probabilities_are_those_of_the_logits() -> None:
    network = make()
    z, lengths = torch.rand(sum(LENGTHS), 8), torch.tensor(LENGTHS)
    matrices = network.decoders.contact_probabilities(z, lengths)
    assert [tuple(matrix.shape) for matrix in matrices] == [(n, n) for n in LENGTHS]
    for start, matrix in zip(starts(LENGTHS), matrices, strict=True):
        torch.testing.assert_close(matrix, matrix.T)
        pairs = start + torch.cartesian_prod(torch.arange(len(matrix)), torch.arange(len(matrix))).T
        logits = network.decoders(z, lengths, pairs)["contact_logits"]
        torch.testing.assert_close(matrix.flatten(), logits.sigmoid(), rtol=1e-5, atol=1e-6)


def test_contacts_leave_the_originals_range() -> None:
    contacts = Decoders(8, 20, 5, 0.0, spectrum=False, foldx=False).geometry.head["contacts"]
    probabilities = contacts(torch.tensor([-1.0, 1.0])).sigmoid()
    assert probabilities[0] < 0.001 and probabilities[1] > 0.95


def test_angles_are_those_of_vectors_of_any_length_and_smooth_at_zero() -> None:
    wanted = torch.linspace(-3, 3, 13)
    for length in (0.01, 1.0, 50.0):
        torch.testing.assert_close(angle(length * wanted.sin(), length * wanted.cos()), wanted)
    zero = torch.zeros(2, 1, requires_grad=True)
    found = angle(*zero)
    assert torch.equal(found.detach(), torch.zeros(1))
    assert torch.isfinite(torch.autograd.grad(found.sum(), zero)[0]).all()


@pytest.mark.parametrize(("width", "most", "heads"), [(100, 5, 5), (64, 5, 4), (256, 5, 4), (150, 5, 5), (7, 5, 1)])
def test_heads_divide_the_width(width: int, most: int, heads: int) -> None:
    assert divisor(width, most) == heads


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision_is_close_and_answers_in_float32(how: str) -> None:
    network = make()
    expected = run(network)
    if how == "parameters":
        network.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = run(network)
    for name in ("encoded", "contact_logits", "distance_logits", "spectrum_2d", "foldx"):
        assert found[name].dtype == torch.float32
    assert (found["encoded"] - expected["encoded"]).abs().mean() < 0.05
    decoded = []
    z = expected["quantized"]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and dtype == torch.bfloat16):
            decoders = make().decoders.to(dtype if how == "parameters" else torch.float32)
            decoded.append(decoders(z, torch.tensor(LENGTHS), pairs_of(LENGTHS)))
    for name, tensor in decoded[0].items():
        assert decoded[1][name].dtype == torch.float32
        if name != "angles":  # which jump from pi to -pi
            assert (decoded[1][name] - tensor).abs().mean() < 0.1 * max(1, float(tensor.std())), name
    some_loss(found).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_finished_steps_travel_with_the_weights() -> None:
    network, other = make(), make()
    network.steps_done += 7
    other.load_state_dict(network.bfloat16().state_dict())
    assert other.steps_done.dtype == torch.int64 and int(other.steps_done) == 7
