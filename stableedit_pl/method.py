"""The method: its settings, and what it makes of the rows and moments of sites that share a scope.

    normalization -> targets -> ridge

Nothing here waits for the device, and nothing is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.moments import Moments
from stableedit_pl.normalization import Normalization, Solver, WhiteningSolver, normalize, solver_for
from stableedit_pl.ridge import SiteUpdate, ridge_update, targets
from stableedit_pl.statistics import Rows


@dataclass(frozen=True)
class MethodSettings:
    """What decides a turn's update, given its rows.

    Attributes:
        normalization: ``whiten`` (StableEdit), ``standardize`` (UltraEdit) or ``none``.
        step_size: scale of the targets.
        ridge: positive weight of the update's squared norm.
        prior_strength: pseudo-observations per dimension of the covariance prior; 0: the paper's.
        eigenvalue_floor: absolute lower bound on the covariance estimate's eigenvalues.
        whitening_solver: who takes the covariance's inverse root: ``eigh``, ``quadrature`` or ``auto``, by device and
            width. The results agree to rounding.
    """

    normalization: Normalization = "whiten"
    step_size: float = 1e-6
    ridge: float = 10.0
    prior_strength: float = 1.0
    eigenvalue_floor: float = 0.0
    whitening_solver: WhiteningSolver = "auto"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            SettingError: naming the setting, what it was and what it may be.
        """
        require_choice("normalization", self.normalization, Normalization)
        for name, allowed in (("step_size", "positive"), ("ridge", "positive")):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be {allowed}, got {getattr(self, name)}")
        for name in ("prior_strength", "eigenvalue_floor"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be zero or positive, got {getattr(self, name)}")
        require_choice("whitening_solver", self.whitening_solver, WhiteningSolver)
        if self.whitening_solver == "quadrature" and (self.prior_strength == 0 or self.eigenvalue_floor > 0):
            raise SettingError(
                "whitening_solver quadrature needs a positive prior_strength and eigenvalue_floor 0, got "
                f"{self.prior_strength} and {self.eigenvalue_floor}; use auto or eigh"
            )

    def identity(self) -> dict[str, Any]:
        """The settings that make a method what it is; the solver only changes how its numbers are found."""
        return {name: value for name, value in asdict(self).items() if name != "whitening_solver"}


@dataclass(frozen=True)
class Solution:
    """A site's ridge regression, solved.

    Attributes:
        update: the change of its weight.
        failed: the factorization's verdict on itself, see :func:`stableedit_pl.ridge.ridge_update`.
        solver: who took the inverse root that whitened its value gradients; None if they were not whitened.
    """

    update: SiteUpdate
    failed: Tensor
    solver: Solver | None


@dataclass(frozen=True)
class Problem:
    """Normalization, targets and ridge of the sites that share a scope's moments, not yet begun.

    Attributes:
        rows: each of these sites' rows, beside the moments.
        key_moments: after the turn, diagonal.
        gradient_moments: after the turn, full.
        settings: the method.
    """

    rows: Mapping[str, Rows]
    key_moments: Moments
    gradient_moments: Moments
    settings: MethodSettings

    def solver(self) -> Solver | None:
        """Who will take the inverse root."""
        s = self.settings
        return solver_for(
            self.gradient_moments, s.normalization, s.prior_strength, s.eigenvalue_floor, s.whitening_solver
        )

    def solve(self) -> dict[str, Solution]:
        """Each site's solution; the inverse root is taken once for all of them."""
        values, solver = self._targets(list(self.rows.values()))
        wanted = torch.split(values, [len(one.keys) for one in self.rows.values()])
        solved = {}
        for (name, own), value in zip(self.rows.items(), wanted, strict=True):
            solved[name] = Solution(*ridge_update(own.keys, value, self.settings.ridge), solver)
        return solved

    def _targets(self, rows: Sequence[Rows]) -> tuple[Tensor, Solver | None]:
        settings = self.settings
        normalized = normalize(
            rows[0].keys if len(rows) == 1 else torch.cat([one.keys for one in rows]),
            rows[0].gradients if len(rows) == 1 else torch.cat([one.gradients for one in rows]),
            self.key_moments,
            self.gradient_moments,
            settings.normalization,
            settings.prior_strength,
            settings.eigenvalue_floor,
            settings.whitening_solver,
        )
        return targets(normalized.keys, normalized.gradients, settings.step_size), normalized.solver


Solve = Callable[[Sequence[Problem]], Mapping[str, Solution]]
"""Solves all problems of a turn: site name to solution."""


def solve_all(problems: Sequence[Problem]) -> dict[str, Solution]:
    """One problem after another, here."""
    return {name: solution for problem in problems for name, solution in problem.solve().items()}
