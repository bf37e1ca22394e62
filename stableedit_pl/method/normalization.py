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

from stableedit_pl.method.inverse_root import (
    apply_by_quadrature,
    apply_root,
    clamped_eigenvalues,
    condition_bound,
    eigen_root,
    quadrature_nodes,
)
from stableedit_pl.method.moments import Moments

Normalization = Literal["whiten", "standardize", "none"]
WhiteningSolver = Literal["auto", "eigh", "quadrature"]
Solver = Literal["eigh", "quadrature", "quadrature (float32)"]

EPS = torch.finfo(torch.float32).eps

QUADRATURE_WIDTH = 2048
"""Width from which quadrature is the faster on a CPU: 300 rows, one thread, float64. eigh took 0.5 ms at width
64, 0.4 s at 1024 and 4.7 s at 2048; quadrature 3 to 5 ms, 0.6 to 0.7 s and 3.9 s."""

SINGLE_WIDTH = 1024
"""Width from which quadrature in float32 is the faster on a CPU, where the spectrum allows it."""

SINGLE_TOLERANCE = 1e-4
"""Relative error of its nodes: an order below what solvers must agree to, and a node in six less than for 1e-5."""

SINGLE_ERROR = 1e-3
"""Largest product of float32's epsilon and the condition number with which a root is taken in float32: a bound on
what the rounding of the solves does to it. What was seen is far less, 2e-7 at a condition number of 2000."""


@dataclass(frozen=True)
class Affine:
    """Rows minus a mean, times a scale per dimension: ``(rows - mean) * scale``.

    Attributes:
        mean: ``[d]``.
        scale: ``[d]``.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalize ``rows [N, d]``; same shape and dtype."""
        return (rows - self.mean).mul_(self.scale)


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
    psi = moments.scatter.to(torch.float64, copy=True)
    n, d = moments.count, psi.shape[0]
    if prior_strength == 0:
        return psi.div_(n - d - 1)
    p = prior_strength * d
    tau = psi.diagonal().sum() / (n * d)
    psi.diagonal().add_(p * tau)
    return psi.div_(n + p)


def spectrum(moments: Moments, prior_strength: float, eigenvalue_floor: float) -> Tensor:
    """Eigenvalues of ``Sigma`` as whitening takes them, ascending, float64 ``[d]``; for those who watch a run."""
    return clamped_eigenvalues(torch.linalg.eigvalsh(covariance(moments, prior_strength)), eigenvalue_floor)


def choose_solver(
    wanted: WhiteningSolver,
    count: int,
    width: int,
    device: torch.device,
    prior_strength: float,
    eigenvalue_floor: float,
) -> Solver:
    """Who takes the inverse root of ``Sigma``.

    Quadrature knows the lower end of the spectrum from the proper prior, and clamps nothing. It leaves to ``eigh`` the
    improper prior, a floor, and (whatever is wanted) so many rows that the prior could sink below float32's epsilon of
    the largest eigenvalue. ``auto`` takes it on a CPU from ``QUADRATURE_WIDTH`` on; on other devices always, because an
    eigendecomposition there makes the host wait for its verdict.

    Args:
        wanted: the setting.
        count: rows in the moments.
        width: ``d_out``.
        device: where the moments live.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: absolute lower bound on eigenvalues.
    """
    possible = prior_strength > 0 and eigenvalue_floor == 0 and (1 + count / prior_strength) * EPS < 1
    preferred = wanted == "quadrature" or (wanted == "auto" and (device.type != "cpu" or width >= QUADRATURE_WIDTH))
    return "quadrature" if possible and preferred else "eigh"


def solver_for(
    moments: Moments,
    method: Normalization,
    prior_strength: float,
    eigenvalue_floor: float,
    wanted: WhiteningSolver,
) -> Solver | None:
    """Who takes the inverse root with these moments; None where the method, or so few rows, take none.

    Args:
        moments: full moments of the value gradients.
        method: ``whiten``, ``standardize`` or ``none``.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: absolute lower bound on eigenvalues.
        wanted: the setting, see :func:`choose_solver`.
    """
    count, width, device = moments.count, moments.mean.shape[0], moments.mean.device
    enough_rows = count >= 2 and (prior_strength > 0 or count > width + 1)
    if method != "whiten" or not enough_rows:
        return None
    if wanted == "auto" and device.type == "cpu" and width >= SINGLE_WIDTH:
        possible = prior_strength > 0 and eigenvalue_floor == 0
        if possible and allows_single(moments, prior_strength):
            return "quadrature (float32)"
    return choose_solver(wanted, count, width, device, prior_strength, eigenvalue_floor)


def allows_single(moments: Moments, prior_strength: float) -> bool:
    """Whether the covariance is so well conditioned that float32 solves leave an error of ``SINGLE_ERROR`` at most.

    Looks at the scatter, which on a CPU makes nobody wait.

    Args:
        moments: full moments of at least two rows.
        prior_strength: positive.
    """
    return condition_bound(moments.scatter, moments.count, prior_strength) * EPS <= SINGLE_ERROR


@dataclass
class KeptRoot:
    """An eigendecomposition that all passes of a turn share: they have the same moments.

    Attributes:
        factors: eigenvectors and inverse roots of the eigenvalues; None before the first pass.
    """

    factors: tuple[Tensor, Tensor] | None = None


def whiten(
    rows: Tensor,
    moments: Moments,
    prior_strength: float,
    eigenvalue_floor: float,
    solver: Solver = "eigh",
    kept: KeptRoot | None = None,
) -> Tensor:
    """Full whitening by the symmetric root, ``(rows - mean) @ Sigma^{-1/2}``.

    Args:
        rows: ``[N, d]``.
        moments: full moments of at least two rows.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: absolute lower bound on eigenvalues; they are never taken below machine epsilon
            (of float32, in which the scatter is kept) times the largest either.
        solver: from :func:`choose_solver`; ``quadrature (float32)`` where :func:`allows_single`.
        kept: keeps the eigendecomposition, and gives it where it has one of these moments.

    Returns:
        ``[N, d]``, dtype of ``rows``.
    """
    centred = rows - moments.mean
    if solver == "quadrature (float32)":
        kappa = condition_bound(moments.scatter, moments.count, prior_strength)
        nodes = quadrature_nodes(kappa, SINGLE_TOLERANCE)
        return apply_by_quadrature(moments.scatter, moments.count, prior_strength, centred, nodes, torch.float32)
    if solver == "quadrature":
        return apply_by_quadrature(moments.scatter, moments.count, prior_strength, centred)
    kept = KeptRoot() if kept is None else kept
    if kept.factors is None:
        kept.factors = eigen_root(covariance(moments, prior_strength), eigenvalue_floor)
    return apply_root(*kept.factors, centred)


@dataclass(frozen=True)
class NormalizedRows:
    """Normalized rows of a turn.

    Attributes:
        keys: ``k^ [N, d_in]``.
        gradients: ``g~ [N, d_out]``.
        solver: who took the inverse root; None where the method took none.
    """

    keys: Tensor
    gradients: Tensor
    solver: Solver | None


def normalize(
    keys: Tensor,
    gradients: Tensor,
    key_moments: Moments,
    gradient_moments: Moments,
    method: Normalization,
    prior_strength: float = 1.0,
    eigenvalue_floor: float = 0.0,
    solver: WhiteningSolver = "auto",
    kept: KeptRoot | None = None,
) -> NormalizedRows:
    """Normalize a turn's rows by moments that already include them.

    Args:
        keys: float32 ``[N, d_in]``.
        gradients: float32 ``[N, d_out]``.
        key_moments: diagonal, ``d_in`` columns.
        gradient_moments: full, ``d_out`` columns.
        method: ``whiten``, ``standardize`` or ``none``.
        prior_strength: see :func:`covariance`.
        eigenvalue_floor: see :func:`whiten`.
        solver: see :func:`choose_solver`.
        kept: see :func:`whiten`.
    """
    if method == "none":
        return NormalizedRows(keys, gradients, None)
    if gradient_moments.count < 2:
        return NormalizedRows(unit_root_mean_square(keys), unit_root_mean_square(gradients), None)
    normalized_keys = standardizer(key_moments)(keys)
    chosen = solver_for(gradient_moments, method, prior_strength, eigenvalue_floor, solver)
    if chosen is None:
        return NormalizedRows(normalized_keys, standardizer(gradient_moments)(gradients), None)
    white = whiten(gradients, gradient_moments, prior_strength, eigenvalue_floor, chosen, kept)
    return NormalizedRows(normalized_keys, white, chosen)
