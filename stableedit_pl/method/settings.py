"""The method's settings, their ranges, and which of them make a run what it is."""

from dataclasses import asdict, dataclass
from typing import Any

from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.method.normalization import Normalization, WhiteningSolver


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
