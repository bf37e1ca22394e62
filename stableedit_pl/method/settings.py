"""The method's settings, their ranges, and which of them make a run what it is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.method.normalization import Normalization, WhiteningSolver

RELATIVE_STEP, RELATIVE_RIDGE = 0.1, 0.01
"""What is taken where neither form of a pair is given; docs/settings.md has what they were measured on."""

PAIRS = (("step_size", "relative_step"), ("ridge", "relative_ridge"))
"""Absolute settings and their forms without a scale: one of each pair is given."""

SHARED_ROOT_PASSES = 3
"""Quadrature begins anew with each pass; at width 2048 and one thread it takes 3.9 s, eigh 4.7 s."""

BEFORE_PASSES: Mapping[str, Any] = {"relative_step": None, "relative_ridge": None, "passes": 1, "enough_margin": None}
"""Settings that runs of version 0.1.0's first builds did not have, and what these runs did."""


@dataclass(frozen=True)
class MethodSettings:
    """What decides a turn's update, given its rows.

    Attributes:
        normalization: ``whiten`` (StableEdit), ``standardize`` (UltraEdit) or ``none``.
        step_size: scale of the targets; None where ``relative_step`` is given.
        ridge: positive weight of the update's squared norm; None where ``relative_ridge`` is given.
        prior_strength: pseudo-observations per dimension of the covariance prior; 0: the paper's.
        eigenvalue_floor: absolute lower bound on the covariance estimate's eigenvalues.
        whitening_solver: who takes the covariance's inverse root: ``eigh``, ``quadrature`` or ``auto``, by device and
            width. The results agree to rounding.
        relative_step: mean norm of what a pass adds to a site's outputs at the turn's keys, relative to the mean norm
            of these outputs; becomes a step size once (:mod:`stableedit_pl.method.scales`).
        relative_ridge: ridge relative to the mean squared key norm; becomes a ridge once.
        passes: how often a turn looks at its edits; 1: the paper.
        enough_margin: difference in probability between an answer token and the best other one from which a further
            pass leaves that token alone.
    """

    normalization: Normalization = "whiten"
    step_size: float | None = None
    ridge: float | None = None
    prior_strength: float = 1.0
    eigenvalue_floor: float = 0.0
    whitening_solver: WhiteningSolver = "auto"
    relative_step: float | None = None
    relative_ridge: float | None = None
    passes: int = 1
    enough_margin: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges, and fill in what neither form was given of.

        Raises:
            SettingError: naming the setting, what it was and what it may be.
        """
        require_choice("normalization", self.normalization, Normalization)
        for absolute, relative in PAIRS:
            given = [name for name in (absolute, relative) if getattr(self, name) is not None]
            if len(given) == 2:
                raise SettingError(
                    f"both {absolute}={getattr(self, absolute):g} and {relative}={getattr(self, relative):g} are "
                    f"given, two forms of one setting: set one of them to null"
                )
            if not given:
                default = RELATIVE_STEP if relative == "relative_step" else RELATIVE_RIDGE
                object.__setattr__(self, relative, default)
        for name in ("step_size", "ridge", "relative_step", "relative_ridge"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise SettingError(f"{name} must be positive, got {value}")
        for name in ("prior_strength", "eigenvalue_floor"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be zero or positive, got {getattr(self, name)}")
        if self.passes < 1:
            raise SettingError(f"passes must be at least 1, got {self.passes}")
        if not 0 < self.enough_margin <= 1:
            raise SettingError(f"enough_margin must be above 0 and at most 1, got {self.enough_margin}")
        require_choice("whitening_solver", self.whitening_solver, WhiteningSolver)
        if self.whitening_solver == "quadrature" and (self.prior_strength == 0 or self.eigenvalue_floor > 0):
            raise SettingError(
                "whitening_solver quadrature needs a positive prior_strength and eigenvalue_floor 0, got "
                f"{self.prior_strength} and {self.eigenvalue_floor}; use auto or eigh"
            )

    @property
    def relative(self) -> bool:
        """Whether a setting waits for rows to become an absolute number."""
        return self.step_size is None or self.ridge is None

    def solver_on(self, device: torch.device) -> WhiteningSolver:
        """The solver to ask for on a device: passes of a turn have one covariance, whose eigenvectors can be kept.

        On a CPU a kept eigendecomposition is the faster from ``SHARED_ROOT_PASSES`` on, at every width; elsewhere it
        would make the host wait.
        """
        shared = self.passes >= SHARED_ROOT_PASSES and device.type == "cpu"
        return "eigh" if shared and self.whitening_solver == "auto" else self.whitening_solver

    def identity(self) -> dict[str, Any]:
        """The settings that make a method what it is; the solver only changes how its numbers are found."""
        identity = {name: value for name, value in asdict(self).items() if name != "whitening_solver"}
        return identity | ({"enough_margin": None} if self.passes == 1 else {})
