"""Rows times the symmetric inverse root of a covariance, by eigendecomposition or by rational quadrature.

Quadrature: Hale, Higham and Trefethen, "Computing A^alpha, log(A), and related matrix functions by contour integrals"
(SIAM J. Numer. Anal. 46, 2008), the method for square roots: with the spectrum of B in ``[1, kappa]``,

    B^{-1/2} = integral over the imaginary axis  ~  sum_j weight_j (B + shift_j I)^{-1},
    shift_j = (sn / cn)^2,  weight_j = 2 K / (pi J) dn / cn^2   at  u_j = (j - 1/2) K / J,  j = 1..J,

Jacobi's elliptic functions and K taken at parameter ``1 - 1 / kappa``. The error falls like
``exp(-2 pi^2 J / (ln kappa + 3))``: a Cholesky factor for each of about ten shifts, solved for the turn's rows only.

The proper prior makes this free of any look at the numbers. With ``u = p tau`` and ``p = prior_strength * d``,
``(n + p) Sigma = Psi + u I = u B``; no eigenvalue of Psi exceeds its trace ``n d tau``, so that
``1 <= B <= 1 + n / prior_strength``. The nodes follow from the count of rows, which the host knows, and from nothing
on the device.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Relative error of the quadrature, on every eigenvalue: below the rounding of the float32 rows it is applied to."""


def elliptic_k(complement: float) -> float:
    """Complete elliptic integral of the first kind at parameter ``1 - complement``, by the arithmetic-geometric mean.

    Args:
        complement: in ``(0, 1]``; given as such because ``1 - parameter`` would lose its digits.
    """
    a, b = 1.0, math.sqrt(complement)
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return math.pi / (a + b)


def jacobi(u: float, complement: float) -> tuple[float, float, float]:
    """Jacobi's ``sn, cn, dn`` at real ``u`` and parameter ``1 - complement``.

    Abramowitz and Stegun 16.4: down the arithmetic-geometric mean, then back by
    ``sin(2 phi_{i-1} - phi_i) = (c_i / a_i) sin phi_i``.

    Args:
        u: the argument, in ``[0, K]``.
        complement: in ``(0, 1]``, see :func:`elliptic_k`.
    """
    a, b, ratios = 1.0, math.sqrt(complement), []
    while abs(a - b) > 1e-15 * a:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ratios.append(c / a)
    phi = 2 ** len(ratios) * a * u
    for ratio in reversed(ratios):
        phi = (phi + math.asin(ratio * math.sin(phi))) / 2
    sn, cn = math.sin(phi), math.cos(phi)
    return sn, cn, math.sqrt(cn * cn + complement * sn * sn)


@lru_cache(maxsize=64)
def quadrature_nodes(kappa: float, tolerance: float = TOLERANCE) -> tuple[tuple[float, float], ...]:
    """The fewest nodes whose sum is ``x^{-1/2}`` to ``tolerance`` (relative) for every x in ``[1, kappa]``.

    Args:
        kappa: upper end of the spectrum, at least 1.
        tolerance: largest relative error allowed.

    Returns:
        ``(shift, weight)`` of each node, shifts ascending.
    """
    complement = 1.0 / kappa
    k = elliptic_k(complement)
    for count in range(1, 100):
        nodes = []
        for j in range(count):
            sn, cn, dn = jacobi((j + 0.5) * k / count, complement)
            nodes.append(((sn / cn) ** 2, 2 * k / (math.pi * count) * dn / cn**2))
        # The error oscillates between extremes of one size, two of which are the ends of the interval.
        if all(abs(inverse_root_of(x, nodes) * math.sqrt(x) - 1) <= tolerance for x in (1.0, kappa)):
            break
    return tuple(nodes)


def inverse_root_of(x: float, nodes: Sequence[tuple[float, float]]) -> float:
    """The quadrature's value for ``x^{-1/2}``."""
    return sum(weight / (x + shift) for shift, weight in nodes)


def condition_bound(scatter: Tensor, count: int, prior_strength: float) -> float:
    """Upper bound on the condition number of Sigma, ``1 + ||Psi||_F / (p tau)``; waits for the device.

    Often far below the bound that rests on counts alone: that one stands for a single direction with all the scatter.

    Args:
        scatter: ``Psi``, see :func:`apply_by_quadrature`.
        count: ``n``, rows in the scatter.
        prior_strength: positive.

    Returns:
        The bound; NaN where the scatter is not finite, 1 where it is zero.
    """
    norm, trace = float(scatter.norm()), float(scatter.diagonal().sum())
    return 1.0 + norm * count / (prior_strength * trace) if trace else 1.0


def apply_by_quadrature(
    scatter: Tensor,
    count: int,
    prior_strength: float,
    rows: Tensor,
    nodes: Sequence[tuple[float, float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``rows @ Sigma^{-1/2}`` for ``Sigma = (Psi + p tau I) / (n + p)``; waits for no device.

    Args:
        scatter: ``Psi``, symmetric ``[d, d]``, any float dtype; its lower triangle is read.
        count: ``n``, rows in the scatter.
        prior_strength: positive; ``p = prior_strength * d`` and ``tau = trace(Psi) / (n d)``.
        rows: ``[N, d]``, centred.
        nodes: from :func:`quadrature_nodes`; by default for the condition number that the count of rows allows.
        dtype: of the factors and solves. float32 halves their time, at an error of its epsilon times that number.

    Returns:
        ``[N, d]`` in the dtype of ``rows``; zeros where the scatter is zero, not finite where its numbers do not form
        a covariance.
    """
    d = scatter.shape[0]
    p = prior_strength * d
    system = scatter.to(dtype, copy=True)
    diagonal = scatter.diagonal().double()
    unit = diagonal.sum() * (p / (count * d))
    seen = unit > 0
    safe = torch.where(seen, unit, torch.ones_like(unit))
    right = rows.T.to(dtype)
    total = torch.zeros_like(right)
    broken = torch.zeros((), dtype=torch.int32, device=rows.device)
    factor, info = torch.empty_like(system), torch.empty_like(broken)
    for shift, weight in nodes or quadrature_nodes(1.0 + count / prior_strength):
        system.diagonal().copy_(diagonal + safe * (1.0 + shift))
        torch.linalg.cholesky_ex(system, out=(factor, info))
        broken |= info
        total.add_(torch.cholesky_solve(right, factor), alpha=weight)
    scale = torch.where(seen, torch.sqrt((count + p) * safe), torch.zeros_like(unit))
    # A failed factor leaves plausible numbers behind.
    scale = torch.where((broken == 0) & torch.isfinite(unit), scale, torch.full_like(unit, math.nan))
    return (total * scale).T.to(rows.dtype)


def root_operations(rows: int, width: int, nodes: int | None) -> float:
    """About how many operations it takes to whiten rows, a multiply-add counted as two.

    Args:
        rows: ``N``.
        width: ``d``.
        nodes: of the quadrature; None for an eigendecomposition.
    """
    if nodes is None:
        return 9.0 * width**3 + 4.0 * rows * width**2
    return nodes * (width**3 / 3 + 2.0 * rows * width**2)


def clamped_eigenvalues(eigenvalues: Tensor, eigenvalue_floor: float) -> Tensor:
    """Ascending eigenvalues ``[d]``, none below the floor or float32's epsilon (the scatter's) times the largest."""
    return torch.maximum(eigenvalues, eigenvalues[-1] * torch.finfo(torch.float32).eps).clamp_(min=eigenvalue_floor)


def eigen_root(covariance: Tensor, eigenvalue_floor: float) -> tuple[Tensor, Tensor]:
    """``Sigma^{-1/2}`` by eigendecomposition: the reference, for any covariance.

    The root is taken in float64: on a spread of 1e8 between eigenvalues a float32 eigendecomposition has no
    correct digit left at the small end, where the inverse root is largest.

    Args:
        covariance: ``Sigma``, float64 ``[d, d]``; overwritten where it is not finite, on which LAPACK may do anything.
        eigenvalue_floor: see :func:`clamped_eigenvalues`.

    Returns:
        Eigenvectors in columns ``[d, d]``, and the inverse roots of their eigenvalues ``[d]``, zeros where the
        covariance is zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance.nan_to_num_(0.0, 0.0, 0.0))
    clamped = clamped_eigenvalues(eigenvalues, eigenvalue_floor)
    return vectors, torch.where(clamped > 0, clamped.rsqrt(), torch.zeros_like(clamped))


def apply_by_eigh(covariance: Tensor, eigenvalue_floor: float, rows: Tensor) -> Tensor:
    """``rows @ Sigma^{-1/2}`` for ``rows [N, d]``, centred, in their dtype; arguments as :func:`eigen_root`."""
    return apply_root(*eigen_root(covariance, eigenvalue_floor), rows)


def apply_root(vectors: Tensor, inverse_root: Tensor, rows: Tensor) -> Tensor:
    """``rows @ Sigma^{-1/2}`` with a root from :func:`eigen_root`.

    Args:
        vectors: ``[d, d]``.
        inverse_root: ``[d]``.
        rows: ``[N, d]``, centred.

    Returns:
        ``[N, d]`` in the dtype of ``rows``.
    """
    white: Tensor = (rows.to(torch.float64) @ vectors).mul_(inverse_root) @ vectors.T
    return white.to(rows.dtype)
