"""Lifelong normalization: from running moments to normalized keys and value gradients.

Shapes: keys ``K [N, d_in]`` and value gradients ``G [N, d_out]``, one row per answer token, float32.

* ``whiten`` (StableEdit): ``k^ = (k - mean_k) / (sigma_k + eps)``, ``g~ = Sigma^{-1/2} (g - mean_g)`` with
  the symmetric inverse root;
* ``standardize`` (UltraEdit): the same keys, ``g~ = (g - mean_g) / (sigma_g + eps)`` per dimension;
* ``none``: rows as they are (lifelong normalization removed: the ablation).

With a proper prior worth ``p = prior_strength * d_out`` pseudo-observations of the average direction,
``tau = trace(Psi) / (n d_out)`` and ``Sigma = (Psi + p tau I) / (n + p)``. ``prior_strength: 0`` is the paper's
improper prior: ``standardize`` until ``n > d_out + 1``, then ``Sigma = Psi / (n - d_out - 1)``.

Before two rows are seen there is no spread to divide by. A row is then divided by its own root mean
square, which keeps the first turn on the scale of all later ones.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stableedit_pl.moments import Moments

Normalization = Literal["whiten", "standardize", "none"]

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Affine:
    """Rows minus a mean, times a scale: ``(rows - mean) * scale`` or, for a matrix scale, ``(rows - mean) @ scale``.

    Attributes:
        mean: ``[d]``.
        scale: ``[d]`` (per dimension) or symmetric ``[d, d]``.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalize ``rows [N, d]``; same shape and dtype."""
        centred = rows - self.mean
        return centred @ self.scale if self.scale.dim() == 2 else centred * self.scale


def unit_root_mean_square(rows: Tensor) -> Tensor:
    """Each row of ``[N, d]`` divided by the root mean square of its entries; a zero row stays zero."""
    rms = rows.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(rms > 0, rows / rms, torch.zeros_like(rows))


def standardizer(moments: Moments) -> Affine:
    """Per-dimension standardization, ``(x - mean) / (sigma + eps)`` with ``sigma^2 = M2 / (n - 1)``.

    Args:
        moments: of at least two rows, full or diagonal.
    """
    squares = moments.scatter.diagonal() if moments.full else moments.scatter
    sigma = (squares / (moments.count - 1)).sqrt()
    return Affine(moments.mean, 1.0 / (sigma + EPS))


def covariance(moments: Moments, prior_strength: float) -> Tensor:
    """Point estimate ``Sigma [d, d]`` (float64) of the value gradients' covariance.

    Args:
        moments: full moments of n rows.
        prior_strength: pseudo-observations per dimension of the scale-matched prior; 0 for the paper's
            improper one, which needs ``n > d + 1``.
    """
    psi = moments.scatter.double()
    n, d = moments.count, psi.shape[0]
    if prior_strength == 0:
        return psi / (n - d - 1)
    p = prior_strength * d
    tau = psi.diagonal().sum() / (n * d)
    return (psi + p * tau * torch.eye(d, dtype=psi.dtype, device=psi.device)) / (n + p)


def whitener(moments: Moments, prior_strength: float, eigenvalue_floor: float) -> tuple[Affine, Tensor]:
    """Full whitening by the symmetric root ``Sigma^{-1/2}``.

    The root is taken in float64: on a spread of 1e8 between eigenvalues a float32 eigendecomposition has no
    correct digit left at the small end, where the inverse root is largest.

    Args:
        moments: full moments of at least two rows.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: absolute lower bound on eigenvalues; they are never taken below machine epsilon
            (of float32, in which the scatter is kept) times the largest either.

    Returns:
        The map, and the eigenvalues of Sigma in ascending order, float64 ``[d]``.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance(moments, prior_strength))
    clamped = eigenvalues.clamp(min=max(eigenvalue_floor, EPS * eigenvalues[-1].item()))
    inverse_root = torch.where(clamped > 0, clamped.rsqrt(), torch.zeros_like(clamped))
    root = (vectors * inverse_root) @ vectors.T
    return Affine(moments.mean, root.to(moments.mean.dtype)), clamped


@dataclass(frozen=True)
class NormalizedRows:
    """One site's normalized rows of a turn.

    Attributes:
        keys: ``k^ [N, d_in]``.
        gradients: ``g~ [N, d_out]``.
        spectrum: eigenvalues of the value gradients' covariance estimate, ascending ``[d_out]``; None where the
            method took no eigendecomposition.
    """

    keys: Tensor
    gradients: Tensor
    spectrum: Tensor | None


def normalize(
    keys: Tensor,
    gradients: Tensor,
    key_moments: Moments,
    gradient_moments: Moments,
    method: Normalization,
    prior_strength: float = 1.0,
    eigenvalue_floor: float = 0.0,
) -> NormalizedRows:
    """Normalize a turn's rows by moments that already include them.

    Args:
        keys: float32 ``[N, d_in]``.
        gradients: float32 ``[N, d_out]``.
        key_moments: diagonal, ``d_in`` columns.
        gradient_moments: full, ``d_out`` columns.
        method: ``whiten``, ``standardize`` or ``none``.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: see :func:`whitener`.
    """
    if method == "none":
        return NormalizedRows(keys, gradients, None)
    if gradient_moments.count < 2:
        return NormalizedRows(unit_root_mean_square(keys), unit_root_mean_square(gradients), None)
    normalized_keys = standardizer(key_moments)(keys)
    enough_rows = prior_strength > 0 or gradient_moments.count > gradient_moments.mean.shape[0] + 1
    if method == "standardize" or not enough_rows:
        return NormalizedRows(normalized_keys, standardizer(gradient_moments)(gradients), None)
    whiten, spectrum = whitener(gradient_moments, prior_strength, eigenvalue_floor)
    return NormalizedRows(normalized_keys, whiten(gradients), spectrum)
