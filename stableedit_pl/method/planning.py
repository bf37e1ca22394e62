"""One turn's mathematics: captured rows and statistics in, planned changes out. Nothing is written here.

    moments -> normalization -> targets -> ridge

DESIGN in one place: keys ``K [N, d_in]`` and value gradients ``G [N, d_out]`` are a site's rows at the turn's
answer tokens; the moments are updated with them first, then they are normalized, turned into targets
``V [N, d_out]``, and the ridge regression of V on K gives the change of the site's weight.

A draft is computed without a look at its numbers, so that the host never waits for the device on the way. Whether they
are good is part of the draft, as tensors; they are read once, at its end, and make the draft a plan or a bad turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stableedit_pl.method.moments import all_finite
from stableedit_pl.method.normalization import Solver
from stableedit_pl.method.problem import Problem, Solution, Solve, solve_all
from stableedit_pl.method.ridge import SiteUpdate, unsolvable
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics, Rows


class BadTurn(ArithmeticError):
    """A turn whose numbers must not reach the weights; nothing of it was committed."""


@dataclass(frozen=True)
class TurnPlan:
    """A turn, computed in full and checked, ready to be committed.

    Attributes:
        statistics: the LN statistics after the turn.
        updates: site name to the change of its weight; empty for a statistics-only turn.
        norms: site name to its update's Frobenius norm.
        solvers: site name to who took the inverse root that whitened its value gradients; without the sites whose were
            not whitened.
    """

    statistics: LNStatistics
    updates: Mapping[str, SiteUpdate] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    solvers: Mapping[str, Solver] = field(default_factory=dict)


@dataclass(frozen=True)
class TurnDraft:
    """A turn, computed in full but unread: what is wrong with it, if anything, is still on its way.

    Attributes:
        statistics: the LN statistics after the turn.
        updates: as in :class:`TurnPlan`.
        solvers: as in :class:`TurnPlan`.
        faults: most important first, what to say and the boolean scalar that is False where it must be said.
        norms: site name to its update's norm, a float64 scalar.
    """

    statistics: LNStatistics
    updates: Mapping[str, SiteUpdate]
    solvers: Mapping[str, Solver]
    faults: Sequence[tuple[str, Tensor]]
    norms: Mapping[str, Tensor]

    def read(
        self, more_faults: Sequence[tuple[str, Tensor]] = (), beside: Tensor | None = None
    ) -> tuple[list[str], TurnPlan, list[float]]:
        """Wait for the numbers: the one place of a turn that does, once for each device.

        Args:
            more_faults: checks of the updates that the caller made, as in :attr:`faults`; they come last.
            beside: other numbers that the caller wants with the same wait.

        Returns:
            What is wrong with the turn, most important first; the plan, which must not be committed if anything is; and
            the elements of ``beside``.
        """
        before, after = [message for message, _ in self.faults], [message for message, _ in more_faults]
        good = [verdict for _, verdict in (*self.faults, *more_faults)]
        wanted = [*good, *self.norms.values()] + ([] if beside is None else [beside])
        read = read_tensors(wanted)
        others = [] if beside is None else read.pop()
        numbers = [value for (value,) in read]
        norms = dict(zip(self.norms, numbers[len(good) :], strict=True))
        unbounded = [name for name, norm in norms.items() if not norm < float("inf")]
        wrong = [message for message, number in zip(before, numbers, strict=False) if not number]
        if unbounded:
            wrong.append(
                f"the update of {', '.join(unbounded)} is not finite; a smaller step_size or a larger ridge may help"
            )
        wrong += [message for message, number in zip(after, numbers[len(before) :], strict=False) if not number]
        return wrong, TurnPlan(self.statistics, self.updates, norms, self.solvers), others


def read_tensors(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The elements of tensors, with one transfer for each device they are on."""
    values: list[list[float]] = [[]] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    for chosen in places.values():
        numbers = torch.cat([tensors[place].double().flatten() for place in chosen]).tolist()
        for place in chosen:
            count = tensors[place].numel()
            values[place], numbers = numbers[:count], numbers[count:]
    return values


def draft_turn(
    captured: Mapping[str, Rows],
    statistics: LNStatistics,
    settings: MethodSettings,
    update_weights: bool = True,
    solve: Solve = solve_all,
) -> TurnDraft:
    """Compute a turn without writing anything, and without waiting for the device.

    Sites on several accelerators are solved at the same time: the host queues the work of each site where its moments
    are and goes on to the next. Sites whose moments are in host memory come last, since the host does those itself.

    Args:
        captured: every site's rows of this turn.
        statistics: LN statistics before the turn.
        settings: the method.
        update_weights: False for a warm-up turn that only feeds the statistics.
        solve: solves the sites' problems.
    """
    # The algebra happens where the moments live, which need not be the model's device.
    names_in_order = list(captured)
    captured = {name: statistics.beside_moments(name, captured[name]) for name in statistics.host_last(captured)}
    faults = [
        (f"keys or value gradients of site {name} are not finite", all_finite(values))
        for name, rows in captured.items()
        for values in (rows.keys, rows.gradients)
    ]
    after = statistics.updated(captured)
    faults += [("the LN statistics would not be finite after this turn", good) for good in after.finite()]
    solutions: Mapping[str, Solution] = {}
    if update_weights:
        scopes = dict.fromkeys(after.scope_of[name] for name in captured)
        members = {scope: {n: r for n, r in captured.items() if after.scope_of[n] == scope} for scope in scopes}
        solutions = solve(
            [Problem(members[scope], after.keys[scope], after.gradients[scope], settings) for scope in scopes]
        )
        faults += [
            (f"site {name}: {unsolvable(solution.update, settings.ridge)}", solution.failed == 0)
            for name, solution in solutions.items()
        ]
    updates = {name: solutions[name].update for name in names_in_order if name in solutions}
    solvers = {name: solution.solver for name, solution in solutions.items() if solution.solver is not None}
    return TurnDraft(after, updates, solvers, faults, {name: update.norm() for name, update in updates.items()})


def plan_turn(
    captured: Mapping[str, Rows],
    statistics: LNStatistics,
    settings: MethodSettings,
    update_weights: bool = True,
    satisfied: bool = False,
) -> TurnPlan:
    """Draft a turn, read it and check it.

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
    wrong, plan, _ = draft_turn(captured, statistics, settings, update_weights).read()
    if wrong:
        raise BadTurn(wrong[0])
    refuse_zero(plan, satisfied)
    return plan


def refuse_zero(plan: TurnPlan, satisfied: bool) -> None:
    """Hold a plan's norms against what the model already answers.

    Raises:
        BadTurn: if all updates are zero although edits are not ``satisfied``.
    """
    if plan.norms and not satisfied and all(norm == 0.0 for norm in plan.norms.values()):
        raise BadTurn(
            "the update is exactly zero at every site although the turn's edits are not satisfied: no edit has a "
            "gradient there"
        )
