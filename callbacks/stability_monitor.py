"""Is the editing stable? Norms, directions and spectra of every site, turn after turn."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.method.normalization import spectrum
from stableedit_pl.method.planning import TurnPlan
from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.model.closed_form import ClosedFormEdit
from stableedit_pl.model.sites import Site
from stableedit_pl.run.curves import log_curves


class StabilityMonitor(Callback):
    """Logs what the paper's theory speaks about, per site.

    ``stability/``: ``update_norm`` ``||Delta||``; ``weight_norm_ratio`` ``||W|| / ||W_0||``; ``cosine_to_previous`` and
    ``cosine_to_sum``, of an update to the one before it and to the sum of all before it (the theory: towards 0);
    ``survived``, the fraction of the intended update that the weight's own dtype kept in this turn.
    ``normalization/``: ``rows`` in the value gradients' moments, ``condition_number``, ``largest_eigenvalue`` and
    ``smallest_eigenvalue`` of their covariance estimate.

    Args:
        every_n_turns: log after every so many turns. A point costs a few passes over each site's weight,
            copies of it, and the eigenvalues of each covariance.
    """

    def __init__(self, every_n_turns: int = 1) -> None:
        """See the class.

        Raises:
            SettingError: if ``every_n_turns`` is not positive.
        """
        if every_n_turns < 1:
            raise SettingError(f"StabilityMonitor.every_n_turns must be at least 1, got {every_n_turns}")
        self.every_n_turns = every_n_turns
        self._previous: dict[str, SiteUpdate] = {}

    def state_dict(self) -> dict[str, Any]:
        """The last update, in factors: a resumed run compares the next one with it."""
        return {name: {"left": u.left.cpu(), "right": u.right.cpu()} for name, u in self._previous.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last update."""
        self._previous = {name: SiteUpdate(**factors) for name, factors in state_dict.items()}

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, batch: Any, batch_idx: int
    ) -> None:
        """Have the turn's survival measured if the turn will be logged."""
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, ClosedFormEdit)
        optimizer.measure_survival = self._due(trainer.global_step + 1)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the turn."""
        assert pl_module.report is not None
        step = pl_module.report.step
        if self._due(trainer.global_step):
            spectra = self._spectra(pl_module, step.plan)
            for site in pl_module.sites:
                update = step.plan.updates.get(site.name)
                stability = self._stability(site, update, step.plan.norms[site.name]) if update is not None else {}
                if site.name in step.survived:
                    stability["survived"] = step.survived[site.name]
                scope = step.plan.statistics.scope_of[site.name]
                normalization = {"rows": float(step.plan.statistics.gradients[scope].count)}
                if site.name in step.plan.solvers:
                    normalization |= spectra[scope]
                log_curves(trainer, "stability", {f"{name}/{site.name}": value for name, value in stability.items()})
                log_curves(
                    trainer, "normalization", {f"{name}/{site.name}": value for name, value in normalization.items()}
                )
        if step.plan.updates:
            self._previous = dict(step.plan.updates)

    def _due(self, turn: int) -> bool:
        return turn % self.every_n_turns == 0

    def _spectra(self, editor: LifelongEditor, plan: TurnPlan) -> dict[str, dict[str, float]]:
        """Curves of each scope whose gradients were whitened; taken here, because quadrature knows no spectrum."""
        settings, moments = editor.settings, plan.statistics.gradients
        scopes = dict.fromkeys(plan.statistics.scope_of[name] for name in plan.solvers)
        return {
            scope: _spectrum(spectrum(moments[scope], settings.prior_strength, settings.eigenvalue_floor))
            for scope in scopes
        }

    def _stability(self, site: Site, update: SiteUpdate, norm: float) -> dict[str, float]:
        original = site.original.to(site.state.device, torch.float32)
        total = site.state.float() - original
        delta = site.oriented(site.placed(update).dense())
        before = total - delta
        # Each over this rank's part of the weight, then over all of it.
        parts = [_square(site.state), _square(original), _square(before), (delta.double() * before.double()).sum()]
        weight, base, past, inner = site.shard.total(torch.stack(parts))
        values = {"update_norm": norm, "weight_norm_ratio": (weight / base).sqrt().item()}
        previous = self._previous.get(site.name)
        if previous is not None:  # before the first update there is no sum, only rounding
            values["cosine_to_sum"] = _cosine(inner, norm, past.sqrt())
            there = update.left.device
            previous = SiteUpdate(previous.left.to(there), previous.right.to(there))
            values["cosine_to_previous"] = _cosine(update.inner(previous), norm, previous.norm())
        return values


def _square(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _cosine(inner: Tensor, norm: float, other: Tensor) -> float:
    product = norm * other.item()
    return inner.item() / product if product > 0 else 0.0


def _spectrum(eigenvalues: Tensor) -> dict[str, float]:
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    values = {"smallest_eigenvalue": smallest, "largest_eigenvalue": largest}
    if smallest > 0:
        values["condition_number"] = largest / smallest
    return values
