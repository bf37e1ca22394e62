"""Which part of a weight this process holds, and what the ranks that hold the others put together."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

# The public interface tells a shard's placements, but not which rows they come to on a mesh of two dimensions.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stableedit_pl.devices import ranks


@dataclass(frozen=True)
class WeightShard:
    """One rank's rectangle of a weight.

    Attributes:
        shape: of the whole weight, as stored.
        rows: first row held here, and the one after the last; they may be equal, on a rank that holds nothing.
        columns: likewise.
        sharded: whether ranks hold different parts. The methods of one that is are collective: all ranks must call them
            in the same order.
    """

    shape: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    sharded: bool

    @classmethod
    def of(cls, weight: Tensor) -> "WeightShard":
        """The shard of a matrix: all of it, unless it is a ``DTensor`` with a sharded placement."""
        height, width = weight.shape
        rows, columns = shard_slices(weight)
        divided = isinstance(weight, DTensor) and not all(placement.is_replicate() for placement in weight.placements)
        return cls((height, width), (rows.start, rows.stop), (columns.start, columns.stop), divided)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's view of a whole matrix, ``[rows here, columns here]``."""
        return whole[slice(*self.rows), slice(*self.columns)]

    def __str__(self) -> str:
        """As in ``[0:2048, 0:14336]``."""
        return f"[{self.rows[0]}:{self.rows[1]}, {self.columns[0]}:{self.columns[1]}]"

    @cached_property
    def _everywhere(self) -> list["WeightShard"]:
        """Every rank's shard of this weight."""
        return ranks.gather(self)

    @property
    def _holders(self) -> list[int]:
        """One rank for each different part: the first that has it."""
        seen: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}
        for rank, shard in enumerate(self._everywhere):
            seen.setdefault((shard.rows, shard.columns), rank)
        return [rank for (rows, columns), rank in seen.items() if rows[0] < rows[1] and columns[0] < columns[1]]

    def gathered(self, own: Tensor) -> Tensor | None:
        """The whole matrix on the CPU of rank 0, of every rank's part; None on the others.

        Parts pass one at a time: no device ever holds more than its own and one other.

        Args:
            own: this rank's part, ``[rows here, columns here]``, any device.
        """
        if not self.sharded:
            return own
        whole = torch.empty(self.shape, dtype=own.dtype) if ranks.rank() == 0 else None
        where = ranks.device()
        for rank in self._holders:
            theirs = self._everywhere[rank]
            if whole is not None and rank == 0:
                theirs.cut(whole).copy_(own)
            elif whole is not None:
                part = torch.empty_like(theirs.cut(whole), device=where, memory_format=torch.contiguous_format)
                with ranks.noticing_losses():
                    dist.recv(part, src=rank)
                theirs.cut(whole).copy_(part)
            elif rank == ranks.rank():
                with ranks.noticing_losses():
                    dist.send(own.contiguous().to(where), dst=0)
        return whole

    def total(self, own: Tensor) -> Tensor:
        """Sum over the whole weight of what each rank summed over its part, the same bytes on every rank.

        Args:
            own: float64 ``[k]``.

        Returns:
            float64 ``[k]``; a part that several ranks hold is counted once.
        """
        if not self.sharded:
            return own
        return ranks.gather_equal(own.reshape(1, -1))[self._holders].sum(dim=0)

    def everywhere(self, verdict: Tensor) -> Tensor:
        """Whether a boolean scalar is true of every rank's part; waits for the device where there are several."""
        if not self.sharded:
            return verdict
        return ranks.gather_equal(verdict.reshape(1, 1).to(torch.uint8)).bool().all()


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where this process's part of a tensor lies in the whole, dimension by dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(sizes) != tuple(tensor.to_local().shape):
        raise RuntimeError(f"a shard {list(tensor.to_local().shape)} where {list(sizes)} belongs; torch has changed")
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(tensor: Tensor) -> None:
    """Wait for a tensor that is still on its way from other ranks, and that nobody is going to look at.

    Tensor parallelism sums some outputs while the next layer starts; torch keeps each until somebody waits for it.
    """
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor.trigger_wait()  # type: ignore[no-untyped-call]
