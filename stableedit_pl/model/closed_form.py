"""The closed-form optimizer: one turn is one step, planned in full, then committed.

Being a ``torch.optim.Optimizer`` is what makes Lightning's automatic optimization count turns: its
``global_step`` is the number of committed turns everywhere, and checkpoints and horizons in turns follow.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableedit_pl.method.guard import Guard
from stableedit_pl.method.planning import BadTurn, TurnDraft, TurnPlan, draft_turn, refuse_zero, what_is_left
from stableedit_pl.method.problem import Solve, solve_all
from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.scales import Scale
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.method.workspace import Workspace, workspace_sizes
from stableedit_pl.model.capture import Captured
from stableedit_pl.model.sites import Site

log = logging.getLogger(__name__)


@dataclass
class EditorState:
    """Everything a turn changes besides the weights, exchanged in one commit.

    Attributes:
        statistics: the LN statistics after the last committed turn.
        committed_turns: how many turns have been committed.
        committing: True only while a commit writes, or passes try weights on; a state in which nothing may be saved.
        scales: absolute settings that relative ones became, by scope.
        guards: site name to what updates leave alone; empty where nothing is.
        rejected_turns: indices of turns whose numbers were bad, so that nothing of them was applied.
        update_norms: norm of each of the last ``NORMS_KEPT`` updates, all sites together.
    """

    statistics: LNStatistics
    committed_turns: int = 0
    committing: bool = False
    scales: dict[str, Scale] = field(default_factory=dict)
    guards: dict[str, Guard] = field(default_factory=dict)
    rejected_turns: list[int] = field(default_factory=list)
    update_norms: list[float] = field(default_factory=list)


NORMS_KEPT = 1000
"""Updates over which the running median of norms is taken."""

NORMS_NEEDED = 5
"""Updates before the running median means anything."""

BadTurns = Literal["raise", "skip"]

Prepared = tuple[Site, SiteUpdate, Workspace]
"""A site, the update it takes, and the scratch memory in which it takes it."""


@dataclass(frozen=True)
class StepInput:
    """What the closure leaves for the step: a turn's rows, and how to treat them.

    Attributes:
        captured: keys and value gradients.
        settings: the method, as it applies to this turn.
        update_weights: False to feed the statistics only.
        again: captures the same edits at the weights as they are then, for a further pass; None: there is one pass.
        count_rows: False where the statistics know the turn's rows already.
        keep_scales: whether relative settings may become absolute numbers for good in this turn.
        seconds: that the capture took.
    """

    captured: Captured
    settings: MethodSettings
    update_weights: bool
    again: Callable[[], Captured] | None = None
    count_rows: bool = True
    keep_scales: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class PassRecord:
    """What one pass of a turn saw before it changed anything.

    Attributes:
        loss: mean over edits of the cross entropy summed over their answer tokens.
        token_match: mean over edits of the fraction of answer tokens that are the model's first choice.
        seconds: how long the pass took, its capture included.
    """

    loss: float
    token_match: float
    seconds: float


@dataclass(frozen=True)
class StepResult:
    """What a committed step did.

    Attributes:
        plan: the plan that was committed.
        survived: site name to ``<applied, intended> / ||intended||^2``: the fraction of the intended update that
            the weight's dtype kept. Empty unless asked for.
        seconds: duration of ``plan`` and ``commit``.
        rejected: why the turn was rejected; None for an applied one.
        passes: what each pass saw, the first included; empty for a turn that left the weights alone.
    """

    plan: TurnPlan
    survived: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rejected: str | None = None
    passes: Sequence[PassRecord] = ()


class ClosedFormEdit(Optimizer):
    """Applies the whitened ridge update to the sites' weights.

    Args:
        sites: the edited weights.
        state: statistics and turn counter, shared with the editor that saves them.
        take_input: returns what the closure left for this step.
        bad_turns: ``raise`` on a turn whose numbers are bad, or ``skip`` it: it counts as committed, nothing of it is
            applied.
        max_update_norm: a turn is bad when its update is larger than so many times the running median; None: never.
        solve: solves a turn's problems, here or together with other ranks.
        lr: the step size, for callbacks that show what an optimizer calls its learning rate; the method's settings, not
            this, decide what is done.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        state: EditorState,
        take_input: Callable[[], StepInput],
        bad_turns: BadTurns = "raise",
        max_update_norm: float | None = None,
        solve: Solve = solve_all,
        lr: float = 0.0,
    ) -> None:
        """See the class."""
        super().__init__([site.module.weight for site in sites], defaults={"lr": lr})
        self._passes: list[PassRecord] = []
        self.sites = list(sites)
        self.editor_state = state
        self.take_input = take_input
        self.bad_turns = bad_turns
        self.max_update_norm = max_update_norm
        self.solve = solve
        self.measure_survival = False
        self.last: StepResult | None = None
        self._solvers: dict[tuple[int, int], str] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loading a checkpoint exchanges the groups; those of older ones have no ``lr``."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure (capture), plan the turn, commit it.

        Args:
            closure: computes the turn's loss and leaves its rows for ``take_input``.

        Returns:
            What the closure returned.

        Raises:
            BadTurn: if the turn's numbers are bad and ``bad_turns`` is ``raise``; nothing is changed then.
        """
        if closure is None:
            raise RuntimeError("ClosedFormEdit.step needs the closure that captures the turn")
        with torch.enable_grad():
            loss = closure()
        given = self.take_input()
        self._passes = []
        started = time.perf_counter()
        rejected = None
        try:
            plan, prepared = self._plan(given)
        except BadTurn as error:
            if self.bad_turns == "raise":
                raise
            rejected, self._passes = str(error), []
            plan, prepared = TurnPlan(self.editor_state.statistics), []
            log.warning("Turn %d is rejected: %s", self.editor_state.committed_turns, rejected)
        planned = time.perf_counter()
        survived = self._commit(plan, prepared, rejected)
        seconds = {"plan": planned - started, "commit": time.perf_counter() - planned}
        self.last = StepResult(plan, survived, seconds, rejected, self._passes)
        self._log_solvers(plan)
        return loss

    def _plan(self, given: StepInput) -> tuple[TurnPlan, list[Prepared]]:
        """The checked plan, and its updates ready to be added."""
        captured, started = given.captured, time.perf_counter() - given.seconds
        draft = draft_turn(
            captured.rows,
            self.editor_state.statistics,
            given.settings,
            given.update_weights,
            self.solve,
            self.editor_state.scales if given.keep_scales else None,
            captured.output_norms,
            given.count_rows,
            self.editor_state.guards,
        )
        if not given.keep_scales:
            draft = replace(draft, kept_scales={})
        if given.update_weights and given.again is not None and given.settings.passes > 1:
            draft = self._further_passes(draft, given, started)
        prepared = self._prepared(draft.updates)
        too_large = [
            (
                f"the update takes the weight of {site.name} out of float16's range; use bfloat16",
                site.stays_in_range(update, workspace),
            )
            for site, update, workspace in prepared
            if site.weight.dtype == torch.float16
        ]
        # Up to here nothing waited for the device. From here on every number is there.
        wrong, plan, measured = draft.read(too_large, given.captured.measured)
        given.captured.take(measured)
        loss, correct = given.captured.mean_loss, given.captured.correct
        if not math.isfinite(loss):
            raise BadTurn("the loss of the turn's edits is not finite")
        if wrong:
            raise BadTurn(wrong[0])
        if plan.updates and not self._passes:
            self._passes = [PassRecord(loss, _mean(correct), time.perf_counter() - started)]
        refuse_zero(plan, satisfied=all(score == 1.0 for score in correct))
        self._refuse_outlier(total_norm(plan))
        return plan, prepared

    def _further_passes(self, first: TurnDraft, given: StepInput, started: float) -> TurnDraft:
        """The draft of all passes together: each captures the edits with the weights as planned so far.

        The weights take the planned updates on and are put back, bit for bit, whatever happens: nothing is committed.
        """
        assert given.again is not None
        draft, total, captured = first, dict(first.updates), given.captured
        with ExitStack() as trials:
            self.editor_state.committing = True  # no state may be saved with weights that are only tried on
            trials.callback(setattr, self.editor_state, "committing", False)
            for site in self.sites:
                trials.enter_context(site.trial())
            for _ in range(given.settings.passes - 1):
                self._check(draft, captured, started)
                started = time.perf_counter()
                self._try_on(draft.updates, total)
                captured = given.again()
                assert captured.margins is not None
                left = what_is_left(captured.margins[:, 0], given.settings.enough_margin)
                if not left.any():
                    return first.together(total)
                draft = draft.further(captured.rows, left, self.solve)
                for name, update in draft.updates.items():
                    total[name] = total[name].plus(update)
            self._check(draft, captured, started)
        return first.together(total)

    def _try_on(self, updates: Mapping[str, SiteUpdate], total: Mapping[str, SiteUpdate]) -> None:
        for site, so_far, workspace in self._prepared(total):
            site.try_on(site.placed(updates[site.name]), so_far, workspace)

    def _check(self, draft: TurnDraft, captured: Captured, started: float) -> None:
        """Wait for a pass's numbers, refuse bad ones, and note what it saw."""
        wrong, _, measured = draft.read(beside=captured.measured)
        captured.take(measured)
        if not math.isfinite(captured.mean_loss):
            raise BadTurn("the loss of the turn's edits is not finite")
        if wrong:
            raise BadTurn(wrong[0])
        self._passes.append(PassRecord(captured.mean_loss, _mean(captured.correct), time.perf_counter() - started))

    def _prepared(self, updates: Mapping[str, SiteUpdate]) -> list[Prepared]:
        """Each edited site with its update and its device's workspace: whatever needs memory happens here."""
        edited = [(site, site.placed(updates[site.name])) for site in self.sites if site.name in updates]
        sizes: dict[torch.device, tuple[int, int]] = {}
        for site, update in edited:
            device = site.state.device
            needed = workspace_sizes(site.state.shape, len(update.left))
            block, factor = sizes.get(device, (0, 0))
            sizes[device] = max(block, needed[0]), max(factor, needed[1])
        workspaces = {device: Workspace(device, *size) for device, size in sizes.items()}
        return [(site, update, workspaces[site.state.device]) for site, update in edited]

    def _refuse_outlier(self, norm: float) -> None:
        past = self.editor_state.update_norms
        if self.max_update_norm is not None and len(past) >= NORMS_NEEDED:
            median = statistics.median(past)
            if norm > self.max_update_norm * median:
                raise BadTurn(
                    f"the update's norm {norm:.4g} is more than max_update_norm={self.max_update_norm:g} times the "
                    f"running median {median:.4g} of {len(past)} turns"
                )

    def _commit(self, plan: TurnPlan, prepared: Sequence[Prepared], rejected: str | None) -> dict[str, float]:
        """Write weights, statistics and counters, in place."""
        state = self.editor_state
        watched = []
        if self.measure_survival:
            for site, update, _ in prepared:
                watched.append((site, site.weight.clone(), site.oriented(update.dense())))
        state.committing = True
        for site, update, workspace in prepared:
            site.add(update, workspace)
        state.statistics = plan.statistics
        state.scales |= plan.kept_scales
        if prepared:
            state.update_norms = [*state.update_norms, total_norm(plan)][-NORMS_KEPT:]
        if rejected is not None:
            state.rejected_turns.append(state.committed_turns)
        state.committed_turns += 1
        state.committing = False
        return {site.name: _survival(site, before, wanted) for site, before, wanted in watched}

    def _log_solvers(self, plan: TurnPlan) -> None:
        """Say once for each shape of site who whitens it, and again if that changes."""
        for site in self.sites:
            solver = plan.solvers.get(site.name)
            shape = (site.d_in, site.d_out)
            if solver is not None and self._solvers.get(shape) != solver:
                self._solvers[shape] = solver
                log.info("Value gradients of %d x %d sites are whitened by %s", *shape, solver)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def total_norm(plan: TurnPlan) -> float:
    """Norm of a plan's update over all sites."""
    return math.hypot(*plan.norms.values())


def _survival(site: Site, before: Tensor, intended: Tensor) -> float:
    """``<after - before, intended> / ||intended||^2``, 1.0 when the dtype kept the whole update."""
    applied = site.weight.double() - before.double()
    wanted = intended.to(applied.device).double()
    inner, square = site.shard.total(torch.stack([(applied * wanted).sum(), wanted.square().sum()]))
    return float(inner / square.clamp(min=torch.finfo(torch.float64).tiny))
