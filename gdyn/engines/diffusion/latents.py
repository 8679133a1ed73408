"""Latents of frozen autoencoders, encoded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Latents = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of ligand and pocket: z_x (n, 3), z_h (n, D), pocket_x (m, 3), pocket_h (m, D)."""


class Cache:
    """Latents by the complex's key, on the CPU, until `limit` bytes are held; what comes later is encoded every time.

    Each complex is encoded by itself, so its latents are the same bit for bit whoever is in its batch, and a resumed
    run sees those of an uninterrupted one.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.held: dict[int, Latents] = {}

    def clear(self) -> None:
        """The autoencoders have other weights."""
        self.bytes, self.held = 0, {}

    def latents(self, batch: dict[str, Tensor], encode: Callable[[dict[str, Tensor]], Latents]) -> Latents:
        """Of a batch, padded like it. encode: of a batch with one complex and no padding, (1, n, ...)."""
        found = [self._one(i, key, batch, encode) for i, key in enumerate(batch["keys"].tolist())]
        columns = zip(*found, strict=True)
        z_x, z_h, pocket_x, pocket_h = (
            _padded(rows, batch[mask])
            for rows, mask in zip(columns, 2 * ["ligand_mask"] + 2 * ["pocket_mask"], strict=True)
        )
        return z_x, z_h, pocket_x, pocket_h

    def _one(
        self, i: int, key: int, batch: dict[str, Tensor], encode: Callable[[dict[str, Tensor]], Latents]
    ) -> Latents:
        if key in self.held:
            return self.held[key]
        z_x, z_h, pocket_x, pocket_h = encode(single(batch, i))
        made = z_x[0], z_h[0], pocket_x[0], pocket_h[0]
        size = sum(tensor.nbytes for tensor in made)
        if self.bytes + size <= self.limit:
            self.held[key] = made[0].cpu(), made[1].cpu(), made[2].cpu(), made[3].cpu()
            self.bytes += size
        return made


def single(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Complex i as a batch of its own, without padding."""
    real = {part: batch[f"{part}_mask"][i] for part in ("ligand", "pocket")}
    return {
        name: tensor[i : i + 1] if name == "keys" else tensor[i, real[name.split("_")[0]]].unsqueeze(0)
        for name, tensor in batch.items()
    }


def _padded(rows: tuple[Tensor, ...], mask_bn: Tensor) -> Tensor:
    """(n, c) of each complex as (B, n, c), zero at padding."""
    result = torch.zeros(*mask_bn.shape, rows[0].shape[-1], device=mask_bn.device)
    result[mask_bn] = torch.cat([row.to(mask_bn.device) for row in rows])
    return result
