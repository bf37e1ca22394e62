"""The closed-form optimizer: one turn is one step, planned in full, then committed.

Being a ``torch.optim.Optimizer`` is what makes Lightning's automatic optimization count turns: its
``global_step`` is the number of committed turns everywhere, and checkpoints and horizons in turns follow.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableedit_pl.capture import Captured
from stableedit_pl.planning import BadTurn, MethodSettings, TurnPlan, plan_turn
from stableedit_pl.sites import Site
from stableedit_pl.statistics import LNStatistics


@dataclass
class EditorState:
    """Everything a turn changes besides the weights, exchanged in one commit.

    Attributes:
        statistics: the LN statistics after the last committed turn.
        committed_turns: how many turns have been committed.
        committing: True only while a commit writes; a state in which nothing may be saved.
    """

    statistics: LNStatistics
    committed_turns: int = 0
    committing: bool = False


@dataclass(frozen=True)
class StepInput:
    """What the closure leaves for the step: a turn's rows, and how to treat them.

    Attributes:
        captured: keys and value gradients.
        settings: the method, as it applies to this turn.
        update_weights: False to feed the statistics only.
    """

    captured: Captured
    settings: MethodSettings
    update_weights: bool


@dataclass(frozen=True)
class StepResult:
    """What a committed step did.

    Attributes:
        plan: the plan that was committed.
        survived: site name to ``<applied, intended> / ||intended||^2``: the fraction of the intended update that
            the weight's dtype kept. Empty unless asked for.
        seconds: duration of ``plan`` and ``commit``.
    """

    plan: TurnPlan
    survived: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class ClosedFormEdit(Optimizer):
    """Applies the whitened ridge update to the sites' weights.

    Args:
        sites: the edited weights.
        state: statistics and turn counter, shared with the editor that saves them.
        take_input: returns what the closure left for this step.
    """

    def __init__(self, sites: Sequence[Site], state: EditorState, take_input: Callable[[], StepInput]) -> None:
        """See the class."""
        super().__init__([site.module.weight for site in sites], defaults={})
        self.sites = list(sites)
        self.editor_state = state
        self.take_input = take_input
        self.measure_survival = False
        self.last: StepResult | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure (capture), plan the turn, commit it.

        Args:
            closure: computes the turn's loss and leaves its rows for ``take_input``.

        Returns:
            What the closure returned.

        Raises:
            BadTurn: if the turn's numbers are bad; weights, statistics and counter are then untouched.
        """
        if closure is None:
            raise RuntimeError("ClosedFormEdit.step needs the closure that captures the turn")
        with torch.enable_grad():
            loss = closure()
        given = self.take_input()
        started = time.perf_counter()
        plan = plan_turn(
            given.captured.rows,
            self.editor_state.statistics,
            given.settings,
            given.update_weights,
            satisfied=all(correct == 1.0 for correct in given.captured.correct),
        )
        planned = time.perf_counter()
        survived = self._commit(plan)
        seconds = {"plan": planned - started, "commit": time.perf_counter() - planned}
        self.last = StepResult(plan, survived, seconds)
        return loss

    def _commit(self, plan: TurnPlan) -> dict[str, float]:
        """Write weights, statistics and counter.

        Whatever needs memory or could fail happens before the first write; the writes are in place.
        """
        state = self.editor_state
        edited = [site for site in self.sites if site.name in plan.updates]
        deltas = [site.prepared(plan.updates[site.name].dense()) for site in edited]
        for site, delta in zip(edited, deltas, strict=True):
            if site.weight.dtype == torch.float16 and site.overflows(delta):
                raise BadTurn(f"the update takes the weight of {site.name} out of float16's range; use bfloat16")
        watched = []
        if self.measure_survival:
            intended = [site.oriented(plan.updates[site.name].dense()) for site in edited]
            watched = [(site, site.weight.clone(), wanted) for site, wanted in zip(edited, intended, strict=True)]
        state.committing = True
        for site, delta in zip(edited, deltas, strict=True):
            site.add(delta)
        state.statistics = plan.statistics
        state.committed_turns += 1
        state.committing = False
        return {site.name: _survival(before, site.weight, wanted) for site, before, wanted in watched}


def _survival(before: Tensor, after: Tensor, intended: Tensor) -> float:
    """``<after - before, intended> / ||intended||^2``, 1.0 when the dtype kept the whole update."""
    applied = after.double() - before.double()
    wanted = intended.to(applied.device).double()
    return float((applied * wanted).sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
