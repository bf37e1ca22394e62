"""A run that says in one line what is wrong with its settings."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.method.settings import PAIRS, MethodSettings
from stableedit_pl.model.asking import ScoringRule
from stableedit_pl.run.files.directory import RunDirectory
from stableedit_pl.run.files.results_file import read_results
from stableedit_pl.run.report import TurnReport

BETTER = 0.05
"""Gain in a turn's own score from which its edits are taken to have had an effect."""

SUMS = ("before", "at_edit", "gained", "promised")

KEPT = 0.3
"""Share of the promised loss that a pass must have gained for its step not to overshoot."""

ENOUGH = 0.95
"""Score from which there is no room for a gain to be seen."""


class RunAdvice(Callback):
    """Speaks up, once each, where settings do not suit the model; part of every ``EditTrainer``.

    * the absolute step and ridge that relative settings became, when they are kept;
    * after the first editing turns, and at the end, if edits score no better right after their turn than before it: the
      step is too small, or so large that it overshoots. The first pass tells the two apart: a small step lowers the
      loss of the turn by as much as its gradients promised, one that overshoots by far less;
    * when retained specificity, as ``EditEvaluation`` takes it, falls below ``specificity_bound``.

    Args:
        after_turns: editing turns that are looked at before the first advice.
        specificity_bound: between 0 and 1; 0 says nothing of specificity.
    """

    def __init__(self, after_turns: int = 3, specificity_bound: float = 0.5) -> None:
        """See the class.

        Raises:
            SettingError: if an argument is out of range.
        """
        if after_turns < 1:
            raise SettingError(f"RunAdvice.after_turns must be at least 1, got {after_turns}")
        if not 0 <= specificity_bound <= 1:
            raise SettingError(f"RunAdvice.specificity_bound must be between 0 and 1, got {specificity_bound}")
        self.after_turns = after_turns
        self.specificity_bound = specificity_bound
        self._state: dict[str, Any] = {"turns": 0, **dict.fromkeys(SUMS, 0.0), "told": []}

    def state_dict(self) -> dict[str, Any]:
        """Running sums, and what was said already."""
        return {**self._state, "told": list(self._state["told"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's sums."""
        self._state.update(state_dict)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the turn."""
        report = pl_module.report
        assert report is not None
        for scope, scale in report.step.plan.kept_scales.items():
            rank_zero_info(
                f"{scope}: {wording(pl_module.settings)} became step_size {scale.step_size:.4g} and ridge "
                f"{scale.ridge:.4g} in turn {report.turn.index}, and stay so"
            )
        if report.turn.phase == "edit" and report.step.passes and report.at_edit_efficacy is not None:
            self._count(report, pl_module.scoring)
            if self._state["turns"] == self.after_turns:
                self._advise("early", pl_module.settings, f"after {self.after_turns} editing turns")
        specificity = trainer.callback_metrics.get("retained_specificity")
        self._watch(None if specificity is None else float(specificity), f"after {trainer.global_step} turns")

    def on_train_end(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """Look at the whole run."""
        self._advise("late", pl_module.settings, f"over all {self._state['turns']} editing turns")
        results = RunDirectory(trainer.default_root_dir).results
        if trainer.is_global_zero and results.exists():
            self._watch(read_results(results)["retained"]["specificity"], "at the end")

    def _count(self, report: TurnReport, rule: ScoringRule) -> None:
        """Add a turn; its score before it is by the rule of the one after, which whole answers have in common."""
        passes = report.step.passes
        assert report.at_edit_efficacy is not None
        after = passes[1].loss if len(passes) > 1 else sum(report.losses_after) / len(report.losses_after)
        self._state["turns"] += 1
        whole = sum(report.known_before) / len(report.known_before)
        self._state["before"] += passes[0].token_match if rule == "token_match" else whole
        self._state["at_edit"] += report.at_edit_efficacy
        self._state["gained"] += passes[0].loss - after
        self._state["promised"] += report.step.plan.expected_gain / len(report.losses_after)

    def _advise(self, when: str, settings: MethodSettings, span: str) -> None:
        turns = self._state["turns"]
        if not turns or when in self._state["told"]:
            return
        before, at_edit, gained, promised = (self._state[name] / turns for name in SUMS)
        if before >= ENOUGH or at_edit >= before + BETTER:
            return
        self._state["told"].append(when)
        name = "step_size" if settings.relative_step is None else "relative_step"
        value = getattr(settings, name)
        cause, change = (
            ("too small", "raise it") if gained > KEPT * promised else ("too large, it overshoots", "lower it")
        )
        rank_zero_warn(
            f"Edits score {at_edit:.3f} right after their turn and {before:.3f} before it, {span}; a first pass lowers "
            f"their loss by {gained:.3g}, its gradients promise {promised:.3g}: model.{name}={value:g} is {cause}; "
            f"{change} threefold, or have it found: stableedit tune"
        )

    def _watch(self, specificity: float | None, when: str) -> None:
        if specificity is None or specificity >= self.specificity_bound or "specificity" in self._state["told"]:
            return
        self._state["told"].append("specificity")
        rank_zero_warn(
            f"Retained specificity is {specificity:.3f} {when}, below {self.specificity_bound:g}: what the model says "
            "of other things is changing. Lower model.relative_step, or raise model.relative_ridge (docs/settings.md)"
        )


def wording(settings: MethodSettings) -> str:
    """The step and ridge of a method, as set."""
    chosen = [name for pair in PAIRS for name in pair if getattr(settings, name) is not None]
    return " and ".join(f"{name} {getattr(settings, name):g}" for name in chosen)
