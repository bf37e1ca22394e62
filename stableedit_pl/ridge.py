"""Ridge regression of a turn: from keys and targets to the change of one site's weight.

    V_i = -step_size * ||k^_i||^2 * g~_i
    Delta = argmin ||K Delta - V||^2 + ridge ||Delta||^2,        Delta [d_in, d_out]

Two closed forms of the same Delta, chosen by shape: ``K^T (K K^T + ridge I)^{-1} V`` (dual, an ``N x N``
system) when there are fewer rows than input dimensions, ``(K^T K + ridge I)^{-1} K^T V`` (primal) otherwise.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteUpdate:
    """The change of one site's weight, in factors: ``Delta = left^T @ right``.

    The dual form *is* a product of the turn's N keys and N coefficient rows. Kept so, an update costs
    ``N (d_in + d_out)`` numbers instead of ``d_in d_out``, and norms and cosines cost as little.

    Attributes:
        left: float32 ``[r, d_in]``.
        right: float32 ``[r, d_out]``.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """``Delta``, float32 ``[d_in, d_out]``."""
        return self.left.T @ self.right

    def inner(self, other: "SiteUpdate") -> Tensor:
        """Frobenius inner product of two updates, float64 scalar."""
        left = self.left.double() @ other.left.double().T
        right = self.right.double() @ other.right.double().T
        return (left * right).sum()

    def norm(self) -> Tensor:
        """Frobenius norm, float64 scalar."""
        return self.inner(self).clamp(min=0).sqrt()


def targets(normalized_keys: Tensor, normalized_gradients: Tensor, step_size: float) -> Tensor:
    """Values the update should add at the turn's keys, ``V [N, d_out]``."""
    return -step_size * normalized_keys.square().sum(dim=1, keepdim=True) * normalized_gradients


def ridge_update(keys: Tensor, values: Tensor, ridge: float) -> SiteUpdate:
    """Solve the turn's ridge regression.

    Args:
        keys: ``K``, float32 ``[N, d_in]``, as captured (not normalized).
        values: ``V``, float32 ``[N, d_out]``.
        ridge: positive weight of ``||Delta||^2``.

    Returns:
        The update.

    Raises:
        ValueError: if the shapes do not belong together or ``ridge`` is not positive.
    """
    if keys.dim() != 2 or values.dim() != 2 or keys.shape[0] != values.shape[0]:
        raise ValueError(f"expected keys [N, d_in] and values [N, d_out], got {list(keys.shape)}, {list(values.shape)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    rows, d_in = keys.shape
    if rows < d_in:
        return SiteUpdate(left=keys, right=_solve(keys @ keys.T, values, ridge))
    delta = _solve(keys.T @ keys, keys.T @ values, ridge)
    return SiteUpdate(left=torch.eye(d_in, dtype=keys.dtype, device=keys.device), right=delta)


def _solve(gram: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge I)^{-1} rhs`` by Cholesky, once more in float64 where float32 breaks down."""
    for dtype in (gram.dtype, torch.float64):
        system = gram.to(dtype) + ridge * torch.eye(gram.shape[0], dtype=dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed.item():
            return torch.cholesky_solve(rhs.to(dtype), factor).to(rhs.dtype)
        if dtype != torch.float64:
            log.warning(
                "The %dx%d ridge system is not positive definite in %s; solving it in float64. "
                "A larger ridge (now %g) avoids this.",
                *gram.shape,
                dtype,
                ridge,
            )
    raise ArithmeticError(
        f"The {gram.shape[0]}x{gram.shape[1]} ridge system is not positive definite even in float64: "
        f"the keys are not finite, or ridge={ridge} is too small for them."
    )
