"""Running moments: count, mean and scatter of the rows seen so far (the LN statistics).

Algorithm 1 and Theorem 3.2 of StableEdit (arXiv 2605.11836): with a batch of m rows, batch mean v and
batch scatter S,

    n' = n + m,   mean' = mean + m (v - mean) / n',   Psi' = Psi + S + (n m / n') (v - mean)(v - mean)^T.

Moments never change in place. An update makes new ones, so that a turn can be planned in full and then
committed by exchanging one reference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def all_finite(values: Tensor) -> Tensor:
    """Whether no entry is infinite or NaN: a boolean scalar on the tensor's device, at no cost in memory."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    smallest, largest = values.aminmax()
    return torch.isfinite(smallest) & torch.isfinite(largest)


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and scatter of rows ``[n, d]``.

    Attributes:
        count: rows seen. A Python integer: a float32 count stops counting at 2**24.
        mean: float32 ``[d]``.
        scatter: sum of squared deviations from the mean, *not* divided by the count: float32 ``[d]`` when
            only the diagonal is kept, ``[d, d]`` when full.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int, full: bool, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no rows: ``width`` columns, full or diagonal scatter."""
        shape = (width, width) if full else (width,)
        # The dtype is named: under bf16-true Lightning makes bfloat16 the default while models are set up.
        mean = torch.zeros(width, dtype=torch.float32, device=device)
        return cls(0, mean, torch.zeros(shape, dtype=torch.float32, device=device))

    @property
    def full(self) -> bool:
        """Whether the scatter is a matrix rather than its diagonal."""
        return self.scatter.dim() == 2

    def updated(self, rows: Tensor) -> "Moments":
        """Moments of the rows seen so far and ``rows`` (float32 ``[m, d]``) together.

        Returns:
            New moments; ``self`` when there are no rows.

        Raises:
            ValueError: if ``rows`` is not ``[m, d]`` with this d.
        """
        if rows.dim() != 2 or rows.shape[1] != self.mean.shape[0]:
            raise ValueError(f"expected rows [m, {self.mean.shape[0]}], got {list(rows.shape)}")
        m = rows.shape[0]
        if m == 0:
            return self
        total = self.count + m
        # Relative to one of the rows, so that equal rows have exactly no scatter: whitening would blow up rounding.
        batch_mean = rows[0] + (rows - rows[0]).mean(dim=0)
        centred = rows - batch_mean
        shift = batch_mean - self.mean
        # The shift between the means is one more row, and all of it one product. In float64, because float32 products
        # are TF32's on a GPU whose user follows Lightning's advice on set_float32_matmul_precision.
        spread = torch.cat([centred, math.sqrt(self.count * m / total) * shift[None]]).double()
        if self.full:
            scatter = self.scatter.double().addmm_(spread.T, spread).float()
        else:
            scatter = (self.scatter + spread.square_().sum(dim=0)).float()
        return Moments(total, self.mean + (m / total) * shift, scatter)

    def finite(self) -> Tensor:
        """Whether mean and scatter are finite: a boolean scalar on their device, which the host need not wait for."""
        return all_finite(self.mean) & all_finite(self.scatter)

    def to(self, device: torch.device | str) -> "Moments":
        """The same moments on another device."""
        return replace(self, mean=self.mean.to(device), scatter=self.scatter.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors: ``count`` (int64 scalar), ``mean``, ``scatter``."""
        return {"count": torch.tensor(self.count, dtype=torch.int64), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "Moments":
        """The inverse of :meth:`tensors`."""
        return cls(int(tensors["count"]), tensors["mean"].to(device), tensors["scatter"].to(device))
