"""Adding an update in factors to a weight by blocks: no dense update, nothing allocated while weights are written.

An update is ``left^T @ right`` with ``left [r, d_in]`` and ``right [r, d_out]`` (see ``SiteUpdate``). Its dense form at
14336 x 4096 is 235 MB in float32 and twice that in the float64 of the product, for each site; a workspace is a block
of ``BLOCK_BYTES`` that all sites take turns in.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stableedit_pl.method.ridge import SiteUpdate

BLOCK_BYTES = 2**26
"""Most that the block of a workspace takes: enough rows to keep the product busy, little beside the weights."""


class Workspace:
    """Scratch memory on one device for sums of a weight and an update, in float64.

    Args:
        device: where the sums are taken.
        block: float64 numbers of the largest block, see :func:`workspace_sizes`.
        factor: float64 numbers of the largest factor that enters whole.
    """

    def __init__(self, device: torch.device, block: int, factor: int) -> None:
        """See the class."""
        self.block = torch.empty(block, dtype=torch.float64, device=device)
        self.factor = torch.empty(factor, dtype=torch.float64, device=device)

    def sums(self, weight: Tensor, update: SiteUpdate, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
        """``weight + update`` by blocks of the weight's rows, rounded nowhere on the way.

        Args:
            weight: ``[d_in, d_out]`` where ``transposed`` (``Conv1D``), else ``[d_out, d_in]``; on this device.
            update: of this shape, on this device.
            transposed: how the weight is stored.

        Yields:
            The rows of a block, and their sum in float64: scratch that the next block overwrites.
        """
        over, whole = (update.left, update.right) if transposed else (update.right, update.left)
        rows, columns = weight.shape
        wide = self.factor[: whole.numel()].view(whole.shape).copy_(whole)
        step, rank = block_rows(rows, columns), len(over)
        for start in range(0, rows, step):
            chosen = slice(start, min(start + step, rows))
            height = chosen.stop - chosen.start
            total = self.block[: height * columns].view(height, columns).copy_(weight[chosen])
            tall = self.block[step * columns :][: rank * height].view(rank, height).copy_(over[:, chosen])
            yield chosen, total.addmm_(tall.T, wide)


def block_rows(rows: int, columns: int) -> int:
    """How many of a weight's rows make a block."""
    return max(1, min(rows, BLOCK_BYTES // (8 * columns)))


def workspace_sizes(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Float64 numbers that a weight needs of a workspace: in its block, and in its factor.

    Args:
        shape: of the weight, as stored.
        rank: rows of the update's factors.
    """
    rows, columns = shape
    return block_rows(rows, columns) * (columns + rank), rank * columns
