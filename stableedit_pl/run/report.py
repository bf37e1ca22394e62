"""What one committed turn did: the record that callbacks log, count and write down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stableedit_pl.data.turns import Turn
from stableedit_pl.model.closed_form import StepResult


@dataclass(frozen=True)
class TurnReport:
    """One committed turn.

    Attributes:
        turn: its edits, phase and index.
        losses_before: cross entropy summed over each edit's answer tokens, with the weights before the turn.
        losses_after: the same with the weights after it.
        known_before: whether the model already gave each edit's whole target: the edit is a no-op.
        at_edit: each edit's score right after the turn; None for a turn that left the weights alone.
        step: the plan that was committed, and how.
        seconds: duration of ``capture``, ``plan``, ``commit`` and ``score``.
    """

    turn: Turn
    losses_before: Sequence[float]
    losses_after: Sequence[float]
    known_before: Sequence[bool]
    at_edit: Sequence[float] | None
    step: StepResult
    seconds: Mapping[str, float]

    @property
    def rejected(self) -> str | None:
        """Why the turn was rejected, so that nothing of it was applied; None for an applied turn."""
        return self.step.rejected

    @property
    def at_edit_efficacy(self) -> float | None:
        """Mean score of the turn's edits."""
        return None if self.at_edit is None else sum(self.at_edit) / len(self.at_edit)

    @property
    def edit_seconds(self) -> float:
        """Time the turn itself took, scores aside."""
        return sum(self.seconds[part] for part in ("capture", "plan", "commit"))
