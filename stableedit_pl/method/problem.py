"""What the method makes of the rows and moments of sites that share a scope.

    normalization -> targets -> ridge

Nothing here waits for the device, and nothing is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableedit_pl.method.moments import Moments
from stableedit_pl.method.normalization import KeptRoot, Solver, WhiteningSolver, normalize, solver_for
from stableedit_pl.method.ridge import SiteUpdate, ridge_update, targets
from stableedit_pl.method.scales import Scale
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import Rows


@dataclass(frozen=True)
class Solution:
    """A site's ridge regression, solved.

    Attributes:
        update: the change of its weight.
        failed: the factorization's verdict on itself, see :func:`stableedit_pl.method.ridge.ridge_update`.
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
        scale: its absolute settings here.
        weights: how much of each row's target is left, ``[rows of a site]``; None for all of it.
        root: what passes of one turn share; None where there is one.
    """

    rows: Mapping[str, Rows]
    key_moments: Moments
    gradient_moments: Moments
    settings: MethodSettings
    scale: Scale
    weights: Tensor | None = None
    root: KeptRoot | None = None

    def solver(self) -> Solver | None:
        """Who will take the inverse root."""
        s = self.settings
        return solver_for(self.gradient_moments, s.normalization, s.prior_strength, s.eigenvalue_floor, self._wanted())

    def _wanted(self) -> WhiteningSolver:
        return self.settings.solver_on(self.gradient_moments.mean.device)

    def solve(self) -> dict[str, Solution]:
        """Each site's solution; the inverse root is taken once for all of them."""
        values, solver = self._targets(list(self.rows.values()))
        wanted = torch.split(values, [len(one.keys) for one in self.rows.values()])
        solved = {}
        for (name, own), value in zip(self.rows.items(), wanted, strict=True):
            if self.weights is not None:
                value = value * self.weights.to(value.device, value.dtype).unsqueeze(1)
            solved[name] = Solution(*ridge_update(own.keys, value, self.scale.ridge), solver)
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
            self._wanted(),
            self.root,
        )
        return targets(normalized.keys, normalized.gradients, self.scale.step_size), normalized.solver


Solve = Callable[[Sequence[Problem]], Mapping[str, Solution]]
"""Solves all problems of a turn: site name to solution."""


def solve_all(problems: Sequence[Problem]) -> dict[str, Solution]:
    """One problem after another, here."""
    return {name: solution for problem in problems for name, solution in problem.solve().items()}
