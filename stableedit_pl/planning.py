"""One turn's mathematics: captured rows and statistics in, planned changes out. Nothing is written here.

    moments -> normalization -> targets -> ridge

DESIGN in one place: keys ``K [N, d_in]`` and value gradients ``G [N, d_out]`` are a site's rows at the turn's
answer tokens; the moments are updated with them first, then they are normalized, turned into targets
``V [N, d_out]``, and the ridge regression of V on K gives the change of the site's weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.normalization import Normalization, normalize
from stableedit_pl.ridge import SiteUpdate, ridge_update, targets
from stableedit_pl.statistics import LNStatistics, Rows


class BadTurn(ArithmeticError):
    """A turn whose numbers must not reach the weights; nothing of it was committed."""


@dataclass(frozen=True)
class MethodSettings:
    """What decides a turn's update, given its rows.

    Attributes:
        normalization: ``whiten`` (StableEdit), ``standardize`` (UltraEdit) or ``none``.
        step_size: scale of the targets.
        ridge: positive weight of the update's squared norm.
        prior_strength: pseudo-observations per dimension of the covariance prior; 0: the paper's.
        eigenvalue_floor: absolute lower bound on the covariance estimate's eigenvalues.
    """

    normalization: Normalization = "whiten"
    step_size: float = 1e-6
    ridge: float = 10.0
    prior_strength: float = 1.0
    eigenvalue_floor: float = 0.0

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


@dataclass(frozen=True)
class TurnPlan:
    """A turn, computed in full and checked, ready to be committed.

    Attributes:
        statistics: the LN statistics after the turn.
        updates: site name to the change of its weight; empty for a statistics-only turn.
        spectra: site name to the eigenvalues of its covariance estimate (ascending, ``[d_out]``), where one
            was taken.
    """

    statistics: LNStatistics
    updates: Mapping[str, SiteUpdate]
    spectra: Mapping[str, Tensor]


def plan_turn(
    captured: Mapping[str, Rows],
    statistics: LNStatistics,
    settings: MethodSettings,
    update_weights: bool = True,
    satisfied: bool = False,
) -> TurnPlan:
    """Compute a turn without writing anything.

    Args:
        captured: every site's rows of this turn.
        statistics: LN statistics before the turn.
        settings: the method.
        update_weights: False for a warm-up turn that only feeds the statistics.
        satisfied: every edit of the turn is already the model's answer, so that a zero update is right.

    Returns:
        The plan.

    Raises:
        BadTurn: if a row, a moment or an update is not finite, or all updates are zero although edits
            are not satisfied.
    """
    for name, rows in captured.items():
        if not (torch.isfinite(rows.keys).all() and torch.isfinite(rows.gradients).all()):
            raise BadTurn(f"keys or value gradients of site {name} are not finite")
    after = statistics.updated(captured)
    if not after.finite():
        raise BadTurn("the LN statistics would not be finite after this turn")
    if not update_weights:
        return TurnPlan(after, {}, {})
    updates: dict[str, SiteUpdate] = {}
    spectra: dict[str, Tensor] = {}
    for name, rows in captured.items():
        updates[name], spectrum = _plan_site(name, rows, after, settings)
        if spectrum is not None:
            spectra[name] = spectrum
    _check(updates, satisfied)
    return TurnPlan(after, updates, spectra)


def _plan_site(
    name: str, rows: Rows, statistics: LNStatistics, settings: MethodSettings
) -> tuple[SiteUpdate, Tensor | None]:
    scope = statistics.scope_of[name]
    key_moments, gradient_moments = statistics.keys[scope], statistics.gradients[scope]
    # The algebra happens where the moments live, which need not be the model's device.
    keys, gradients = rows.keys.to(key_moments.mean.device), rows.gradients.to(gradient_moments.mean.device)
    normalized = normalize(
        keys,
        gradients,
        key_moments,
        gradient_moments,
        settings.normalization,
        settings.prior_strength,
        settings.eigenvalue_floor,
    )
    values = targets(normalized.keys, normalized.gradients, settings.step_size)
    try:
        return ridge_update(keys, values, settings.ridge), normalized.spectrum
    except ArithmeticError as error:
        raise BadTurn(f"site {name}: {error}") from error


def _check(updates: Mapping[str, SiteUpdate], satisfied: bool) -> None:
    norms = {name: update.norm().item() for name, update in updates.items()}
    bad = [name for name, norm in norms.items() if not norm < float("inf")]
    if bad:
        raise BadTurn(f"the update of {', '.join(bad)} is not finite; a smaller step_size or a larger ridge may help")
    if not satisfied and all(norm == 0.0 for norm in norms.values()):
        raise BadTurn(
            "the update is exactly zero at every site although the turn's edits are not satisfied: no edit has a "
            "gradient there"
        )
