"""Vector quantizer: a learned alphabet of K codes in D dimensions (van den Oord et al., NeurIPS 2017, appendix A.1 for
the moving averages).

The codes are either moving averages of the vectors assigned to them, which no optimizer knows of, or a parameter that
follows the gradient of the codebook loss. What they learn from an optimizer step are sums over all vectors of its
window, so it does not matter how these were split among ranks and micro-batches.

Legend: R vectors, D dimensions, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.ds_engine import whole
from gdyn.errors import UserError


class Quantizer(nn.Module):
    """Replaces vectors by the nearest of K codes.

    A code that no vector chose for `revive_after` optimizer steps splits the cell of another one (as in Linde, Buzo and
    Gray, IEEE Trans. Commun. 28 (1980) 84): cells are drawn in proportion to their summed squared distances from their
    means, where another code helps most. The draws come from a seed that is part of the state, so they are the same on
    all ranks, and after a resume.

    Raises: UserError for fewer than two codes.
    """

    counts: Tensor
    """(K,) moving average of the vectors per optimizer step that chose each code."""
    idle: Tensor
    """(K,) int64: optimizer steps since each code was last used."""
    seed: Tensor
    """() int64: of the next draw."""
    sums: Tensor
    """(K, D), with ema: moving average of the sums of these vectors."""
    offset: Tensor
    """(K, D), without ema: the codes are weight + offset. Revival moves the offset, because the weight's true value is
    in the optimizer's hands, sharded and in another precision."""

    def __init__(
        self,
        codes: int,
        dim: int,
        ema: bool = True,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        revive_after: int = 20,
    ):
        super().__init__()
        if codes < 2:
            raise UserError(f"an alphabet of {codes} codes says nothing; at least 2 are needed.")
        self.codes, self.dim, self.ema, self.decay, self.epsilon = codes, dim, ema, decay, epsilon
        self.revive_after = revive_after
        initial = torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
        # Counts of zero would turn every code that the first batch leaves out into a vector of length 1 / epsilon.
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**62, ()))
        if ema:
            self.register_buffer("sums", initial)
        else:
            self.weight = nn.Parameter(initial)
            self.register_buffer("offset", torch.zeros(codes, dim))

    def forward(self, x_rd: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest codes (R, D), their numbers (R,) int64); of equally near ones the first. They have no gradient to x,
        and one to the codebook only without ema."""
        codebook = self._codebook()
        with torch.no_grad():
            # Not by |x|² - 2 x·e + |e|²: vectors that lie close together far from the origin lose all digits there.
            distances = torch.cdist(x_rd.float(), codebook, compute_mode="donot_use_mm_for_euclid_dist")
            codes = distances.argmin(1)
        return F.embedding(codes, codebook).to(x_rd.dtype), codes

    def codebook(self) -> Tensor:
        """(K, D) float32. Every rank must call this under ZeRO-3."""
        with torch.no_grad(), whole(self.parameters()):
            return self._codebook().clone()

    def usage(self) -> Tensor:
        """(K,) share of each code among the vectors of recent optimizer steps."""
        return self.counts / self.counts.sum()

    def perplexity(self) -> Tensor:
        """exp(entropy) of `usage`: how many codes are in use, counted as if all were used alike."""
        return torch.special.entr(self.usage()).sum().exp()

    @property
    def statistics_width(self) -> int:
        return self.codes * (2 + self.dim)

    @torch.no_grad()
    def statistics(self, x_rd: Tensor, codes_r: Tensor) -> Tensor:
        """What `update` wants to know of these vectors, additive, `statistics_width` float64 numbers: for each code the
        count, the sum of squared lengths and the sum of the vectors that chose it."""
        x = x_rd.double()
        rows = torch.cat([torch.ones_like(x[:, :1]), x.square().sum(1, keepdim=True), x], 1)
        return x.new_zeros(self.codes, 2 + self.dim).index_add_(0, codes_r, rows).flatten()

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Learn from the `statistics` of an optimizer step, summed over all its vectors. Every rank must call this,
        with the same sums."""
        count, squares, sums = statistics.view(self.codes, -1).split([1, 1, self.dim], 1)
        count = count.squeeze(1)
        self._average(self.counts, count)
        if self.ema:
            self._average(self.sums, sums)
        self.idle.copy_(torch.where(count > 0, 0, self.idle + 1))
        dead = (self.idle >= self.revive_after).nonzero().squeeze(1)
        if len(dead):
            self._revive(dead, count.cpu(), squares.squeeze(1).cpu(), sums.cpu())

    def _codebook(self) -> Tensor:
        if not self.ema:
            return self.weight.float() + self.offset
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.codes * self.epsilon) * total
        return self.sums / smoothed[:, None]

    def _average(self, average: Tensor, new: Tensor) -> None:
        average.copy_(self.decay * average.double() + (1 - self.decay) * new)

    def _revive(self, dead: Tensor, count: Tensor, squares: Tensor, sums: Tensor) -> None:
        """Put each dead code beside the mean of a cell, at a distance that is the cell's spread in one dimension. In
        many dimensions a code that lies as far away as the vectors do is the nearest one to none of them."""
        count = count.clamp_min(1)
        means = sums / count[:, None]
        scatter = (squares - count * means.square().sum(1)).clamp_min(0)
        if not scatter.any():
            return  # no cell has anything to share
        generator = torch.Generator().manual_seed(int(self.seed))
        self.seed += 1
        donors = torch.multinomial(scatter, len(dead), replacement=True, generator=generator)
        noise = torch.randn(len(dead), self.dim, generator=generator, dtype=torch.float64)
        spread = (scatter / count / self.dim).sqrt()[donors, None]
        revived = (means[donors] + spread * noise / self.dim**0.5).to(self.counts)
        self.idle[dead] = 0
        if self.ema:
            # A count of one, as at the start: the code soon is the mean of what it gets.
            self.counts[dead] = 1
            self.sums[dead] = revived
        else:
            with whole(self.parameters()):
                self.offset[dead] = revived - self.weight[dead].float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Buffers follow the module to a device, but not to half precision, which cannot hold a moving average."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            assert now is not None
            if now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self
