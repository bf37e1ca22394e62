"""Relative settings become absolute numbers, once.

Key norms differ between layers and models by orders of magnitude, gradients with the loss: no absolute step or ridge
means anything on another model. With a turn's keys ``K [N, d_in]`` and a site's outputs ``Y [N, d_out]`` there,

    ridge     = relative_ridge * mean_i ||K_i||^2
    step_size = relative_step * mean_i ||Y_i|| / mean_i ||K_i Delta_1||

where ``Delta_1`` is the update of the turn's first pass with step size 1: an update is linear in it. Means are over the
rows of all sites that share a scope's moments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.settings import MethodSettings


@dataclass(frozen=True)
class Scale:
    """Absolute settings of the sites that share a scope's moments.

    Attributes:
        step_size: scale of their targets.
        ridge: weight of an update's squared norm.
    """

    step_size: float
    ridge: float


Scales = Mapping[str, Scale]
"""Scope key (a site, or a shape) to its scale."""


def plain_scales(scales: Scales) -> dict[str, dict[str, float]]:
    """As files keep them."""
    return {scope: asdict(scale) for scope, scale in scales.items()}


def enough_rows(count: int, d_out: int) -> bool:
    """Whether a scope's moments rest on enough rows for a scale to be kept: as many as directions.

    With fewer the covariance is mostly prior, and updates of one size grow as it fills (docs/settings.md).
    """
    return count >= d_out


def ridge_for(keys: Sequence[Tensor], settings: MethodSettings) -> float:
    """The ridge of a scope: the absolute setting, or the relative one times the mean squared key norm.

    Args:
        keys: of each of the scope's sites, float32 ``[N, d_in]``.
        settings: the method.
    """
    if settings.ridge is not None:
        return settings.ridge
    assert settings.relative_ridge is not None
    squares = torch.stack([site.double().square().sum() for site in keys]).sum()
    return settings.relative_ridge * float(squares) / sum(len(site) for site in keys)


def step_for(
    keys: Sequence[Tensor], updates: Sequence[SiteUpdate], output_norms: Sequence[Tensor], relative_step: float
) -> float | None:
    """The step size with which a scope's first pass adds ``relative_step`` of its sites' own outputs.

    Args:
        keys: of each of the scope's sites, float32 ``[N, d_in]``.
        updates: theirs with step size 1.
        output_norms: norm of each site's output at each key, ``[N]``.
        relative_step: the setting.

    Returns:
        None where the update adds nothing, or outputs or update are not finite: there is no such step.
    """
    pairs = zip(keys, updates, strict=True)
    added = float(torch.stack([update.at(site).norm(dim=1).sum() for site, update in pairs]).sum())
    own = float(torch.stack([norms.double().sum() for norms in output_norms]).sum())
    step = relative_step * own / added if added > 0 else 0.0
    return step if 0 < step < float("inf") else None
