"""Ridge regression of a turn: from keys and targets to the change of one site's weight.

    V_i = -step_size * ||k^_i||^2 * g~_i
    Delta = argmin ||K Delta - V||^2 + ridge ||Delta||^2,        Delta [d_in, d_out]

Two closed forms of the same Delta, chosen by shape: ``K^T (K K^T + ridge I)^{-1} V`` (dual, an ``N x N``
system) when there are fewer rows than input dimensions, ``(K^T K + ridge I)^{-1} K^T V`` (primal) otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteUpdate:
    """The change of one site's weight, in factors: ``Delta = left^T @ right``.

    The dual form *is* a product of the turn's N keys and N coefficient rows. Kept so, an update costs
    ``N (d_in + d_out)`` numbers instead of ``d_in d_out``, and norms and cosines cost as little.

    Attributes:
        left: float32 ``[r, d_in]``.
        right: float64 ``[r, d_out]``.
        left_gram: ``left @ left^T``, float64 ``[r, r]``, where the solver had made it already.
    """

    left: Tensor
    right: Tensor
    left_gram: Tensor | None = None

    def dense(self) -> Tensor:
        """``Delta``, float32 ``[d_in, d_out]``."""
        return (self.left.T.to(self.right.dtype) @ self.right).float()

    def inner(self, other: "SiteUpdate") -> Tensor:
        """Frobenius inner product of two updates, float64 scalar."""
        left = self.left.double() @ other.left.double().T
        right = self.right.double() @ other.right.double().T
        return (left * right).sum()

    def at(self, keys: Tensor) -> Tensor:
        """What it adds to the outputs at ``keys [N, d_in]``: ``K Delta``, float64 ``[N, d_out]``."""
        if self.left is keys and self.left_gram is not None:
            return self.left_gram @ self.right
        return (keys.double() @ self.left.double().T) @ self.right.double()

    def scaled(self, factor: float) -> "SiteUpdate":
        """The update times a number."""
        return SiteUpdate(self.left, self.right * factor, self.left_gram)

    def plus(self, other: "SiteUpdate") -> "SiteUpdate":
        """The sum of two updates, still in factors: their rows one below the other, or added where the left ones agree.

        Passes of a turn have the same keys at its first site: what they do there is one update of as many rows.
        """
        if self.left is other.left or (self.left.shape == other.left.shape and torch.equal(self.left, other.left)):
            return SiteUpdate(self.left, self.right + other.right, self.left_gram)
        return SiteUpdate(torch.cat([self.left, other.left]), torch.cat([self.right, other.right]))

    def norm(self) -> Tensor:
        """Frobenius norm, float64 scalar."""
        gram = self.left_gram
        if gram is None:
            left = self.left.double()
            gram = left @ left.T
        right = self.right.double()
        return (gram * (right @ right.T)).sum().clamp(min=0).sqrt()


def targets(normalized_keys: Tensor, normalized_gradients: Tensor, step_size: float) -> Tensor:
    """Values the update should add at the turn's keys, ``V [N, d_out]``."""
    return -step_size * normalized_keys.square().sum(dim=1, keepdim=True) * normalized_gradients


def ridge_update(keys: Tensor, values: Tensor, ridge: float) -> tuple[SiteUpdate, Tensor]:
    """Solve the turn's ridge regression.

    Args:
        keys: ``K``, float32 ``[N, d_in]``, as captured (not normalized).
        values: ``V``, float32 ``[N, d_out]``.
        ridge: positive weight of ``||Delta||^2``.

    Returns:
        The update, and the verdict on it, an int32 scalar on its device: not zero where the system is not positive
        definite, so that the update is worthless (see :func:`unsolvable`). Reading it is left to the caller: the
        host would wait for the device.

    Raises:
        ValueError: if the shapes do not belong together or ``ridge`` is not positive.
    """
    if keys.dim() != 2 or values.dim() != 2 or keys.shape[0] != values.shape[0]:
        raise ValueError(f"expected keys [N, d_in] and values [N, d_out], got {list(keys.shape)}, {list(values.shape)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    rows, d_in = keys.shape
    # float64 throughout: similar keys with different targets give large coefficients that cancel, and float32 is left
    # with too few digits of the difference, silently. The systems are small.
    k, v = keys.double(), values.double()
    if rows < d_in:
        gram = k @ k.T
        right, failed = _solve(gram.clone(), v, ridge)
        return SiteUpdate(left=keys, right=right, left_gram=gram), failed
    right, failed = _solve(k.T @ k, k.T @ v, ridge)
    return SiteUpdate(left=torch.eye(d_in, dtype=keys.dtype, device=keys.device), right=right), failed


def ridge_operations(rows: int, d_in: int, d_out: int) -> float:
    """About how many operations :func:`ridge_update` takes, a multiply-add counted as two."""
    rank = min(rows, d_in)
    cross = 2.0 * rows * d_in * d_out if rank < rows else 0.0
    return 2.0 * rows * d_in * rank + cross + rank**3 / 3 + 2.0 * rank * rank * d_out


def _solve(gram: Tensor, rhs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``(gram + ridge I)^{-1} rhs`` by Cholesky, and what the factorization says of itself; ``gram`` is overwritten."""
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(rhs, factor), failed


def unsolvable(update: SiteUpdate, ridge: float) -> str:
    """What to say of an update whose system is not positive definite."""
    size = update.left.shape[0]
    return (
        f"the {size}x{size} ridge system is not positive definite: the keys are not finite, or ridge={ridge:g} is too "
        "small for keys of this size"
    )
