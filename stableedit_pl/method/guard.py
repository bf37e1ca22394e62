"""Directions in which a site's inputs on unrelated text lie, and an update that leaves them alone.

With keys ``X [M, d_in]`` of unrelated text and ``C = X^T X / M`` a turn's ridge regression becomes

    Delta = argmin ||K Delta - V||^2 + ridge ||Delta||^2 + weight N tr(Delta^T C Delta)
          = L^T (L K^T + ridge I)^{-1} V,     L = ridge K (ridge I + weight N C)^{-1}

as if ``weight N`` rows of that text were among the turn's ``N``, with targets of zero. ``C`` is kept as its ``r``
largest eigenvectors ``Q [r, d_in]`` and eigenvalues ``l``, so that ``L = K - (K Q^T) diag(s) Q`` with
``s = weight N l / (ridge + weight N l)``: one product in, one out, and the update stays in factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guard:
    """What is to be left alone at one site.

    Attributes:
        directions: ``Q``, orthonormal rows, float32 ``[r, d_in]``.
        energies: ``l``, mean squared length of the text's keys along each of them, float64 ``[r]``.
        weight: of the text, relative to a turn's own rows.
    """

    directions: Tensor
    energies: Tensor
    weight: float

    def held_back(self, keys: Tensor, ridge: float) -> Tensor:
        """``L``, float64 ``[N, d_in]``, of ``keys [N, d_in]``."""
        there = keys.device
        q, energies = self.directions.to(there).double(), self.energies.to(there)
        strength = self.weight * len(keys) * energies
        k = keys.double()
        return k - ((k @ q.T) * (strength / (ridge + strength))) @ q


def guard_of(keys: Tensor, rank: int, weight: float) -> Guard:
    """The largest directions of a text's keys.

    Args:
        keys: ``X``, float32 ``[M, d_in]``.
        rank: most directions.
        weight: see :class:`Guard`.

    Returns:
        On the CPU.
    """
    x = keys.double().cpu()
    rows, d_in = x.shape
    if rows < d_in:  # the same eigenvectors by the smaller of the two products
        values, vectors = torch.linalg.eigh(x @ x.T / rows)
    else:
        values, vectors = torch.linalg.eigh(x.T @ x / rows)
    kept = values > values[-1].clamp(min=0) * 1e-10
    values, vectors = values[kept].flip(0)[:rank], vectors[:, kept].flip(1)[:, :rank]
    if rows < d_in:
        vectors = x.T @ vectors / (rows * values).sqrt()
    return Guard(vectors.T.float().contiguous(), values.contiguous(), weight)


def guard_bytes(d_in: int, rank: int) -> int:
    """Bytes of a site's guard."""
    return rank * (4 * d_in + 8)
