"""One turn's mathematics: captured rows and statistics in, planned changes out. Nothing is written here.

    moments -> (normalization -> targets -> ridge), once or, in several passes, again at the weights as planned so far

DESIGN in one place: keys ``K [N, d_in]`` and value gradients ``G [N, d_out]`` are a site's rows at the turn's
answer tokens; the moments are updated with them first, then they are normalized, turned into targets
``V [N, d_out]``, and the ridge regression of V on K gives the change of the site's weight.

A draft is computed without a look at its numbers, so that the host never waits for the device on the way. Whether they
are good is part of the draft, as tensors; they are read once, at its end, and make the draft a plan or a bad turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stableedit_pl.method.guard import Guard
from stableedit_pl.method.moments import all_finite
from stableedit_pl.method.normalization import KeptRoot, Solver
from stableedit_pl.method.problem import Problem, Solution, Solve, solve_all
from stableedit_pl.method.ridge import SiteUpdate, unsolvable
from stableedit_pl.method.scales import Scale, Scales, enough_rows, ridge_for, step_for
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
        kept_scales: absolute settings that relative ones became in this turn, and that all later turns are to have.
        expected_gain: by how much the first pass would lower the loss of which it took gradients, were that linear.
    """

    statistics: LNStatistics
    updates: Mapping[str, SiteUpdate] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    solvers: Mapping[str, Solver] = field(default_factory=dict)
    kept_scales: Scales = field(default_factory=dict)
    expected_gain: float = 0.0


@dataclass(frozen=True)
class TurnDraft:
    """A turn, computed in full but unread: what is wrong with it, if anything, is still on its way.

    Attributes:
        statistics: the LN statistics after the turn.
        updates: as in :class:`TurnPlan`.
        solvers: as in :class:`TurnPlan`.
        faults: most important first, what to say and the boolean scalar that is False where it must be said.
        norms: site name to its update's norm, a float64 scalar.
        problems: what was solved; a further pass takes their moments, roots and scales.
        kept_scales: as in :class:`TurnPlan`.
        gains: site name to its part of the expected gain, a float64 scalar.
    """

    statistics: LNStatistics
    updates: Mapping[str, SiteUpdate]
    solvers: Mapping[str, Solver]
    faults: Sequence[tuple[str, Tensor]]
    norms: Mapping[str, Tensor]
    problems: Mapping[str, Problem] = field(default_factory=dict)
    kept_scales: Scales = field(default_factory=dict)
    gains: Mapping[str, Tensor] = field(default_factory=dict)

    def further(self, captured: Mapping[str, Rows], weights: Tensor, solve: Solve = solve_all) -> "TurnDraft":
        """One more pass over the turn's edits, captured at the weights as planned so far.

        The statistics know these edits already: they are neither counted nor changed.

        Args:
            captured: every site's rows, in the order of the first pass.
            weights: how much of each row's target is left, ``[N]``, from :func:`what_is_left`.
            solve: solves the sites' problems.

        Returns:
            A draft whose updates are this pass's alone.
        """
        placed = {name: self.statistics.beside_moments(name, captured[name]) for name in captured}
        problems = {
            scope: replace(before, rows={name: placed[name] for name in before.rows}, weights=weights)
            for scope, before in self.problems.items()
        }
        faults = [
            (f"keys or value gradients of site {name} are not finite in a further pass", all_finite(values))
            for name, rows in placed.items()
            for values in (rows.keys, rows.gradients)
        ]
        solutions = solve(list(problems.values()))
        updates = {name: solutions[name].update for name in self.updates}
        failed = _unsolved(problems, solutions)
        norms = {name: update.norm() for name, update in updates.items()}
        return replace(self, updates=updates, faults=[*faults, *failed], norms=norms, problems=problems)

    def together(self, updates: Mapping[str, SiteUpdate]) -> "TurnDraft":
        """The draft of a turn whose passes add up to ``updates``; what was wrong with a pass was said by its own."""
        return replace(
            self, updates=updates, faults=[], norms={name: update.norm() for name, update in updates.items()}
        )

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
        wanted = [*good, *self.norms.values(), *self.gains.values()] + ([] if beside is None else [beside])
        read = read_tensors(wanted)
        others = [] if beside is None else read.pop()
        numbers = [value for (value,) in read]
        norms = dict(zip(self.norms, numbers[len(good) :], strict=False))
        unbounded = [name for name, norm in norms.items() if not norm < float("inf")]
        wrong = [message for message, number in zip(before, numbers, strict=False) if not number]
        if unbounded:
            wrong.append(
                f"the update of {', '.join(unbounded)} is not finite; a smaller step_size or a larger ridge may help"
            )
        wrong += [message for message, number in zip(after, numbers[len(before) :], strict=False) if not number]
        gain = sum(numbers[len(good) + len(norms) :])
        plan = TurnPlan(self.statistics, self.updates, norms, self.solvers, self.kept_scales, gain)
        return wrong, plan, others


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
    scales: Scales | None = None,
    output_norms: Mapping[str, Tensor] | None = None,
    count_rows: bool = True,
    guards: Mapping[str, Guard] | None = None,
) -> TurnDraft:
    """Compute a turn, or the first of its passes, without writing anything, and without waiting for the device.

    Sites on several accelerators are solved at the same time: the host queues the work of each site where its moments
    are and goes on to the next. Sites whose moments are in host memory come last, since the host does those itself.
    Only where a relative setting has still to become a number does the host wait for it.

    Args:
        captured: every site's rows of this turn.
        statistics: LN statistics before the turn.
        settings: the method.
        update_weights: False for a warm-up turn that only feeds the statistics.
        solve: solves the sites' problems.
        scales: those that an earlier turn kept, by scope.
        output_norms: site name to the norm of its output at each of the turn's answer tokens, ``[N]``; needed where
            ``relative_step`` has still to become a number.
        count_rows: False where the statistics know the turn's rows already.
        guards: site name to what its update leaves alone.
    """
    # The algebra happens where the moments live, which need not be the model's device.
    names_in_order = list(captured)
    captured = {name: statistics.beside_moments(name, captured[name]) for name in statistics.host_last(captured)}
    faults = [
        (f"keys or value gradients of site {name} are not finite", all_finite(values))
        for name, rows in captured.items()
        for values in (rows.keys, rows.gradients)
    ]
    after = statistics.updated(captured) if count_rows else statistics
    faults += [("the LN statistics would not be finite after this turn", good) for good in after.finite()]
    if not update_weights:
        return TurnDraft(after, {}, {}, faults, {})
    scopes = dict.fromkeys(after.scope_of[name] for name in captured)
    members = {scope: {n: r for n, r in captured.items() if after.scope_of[n] == scope} for scope in scopes}
    known = {} if scales is None else scales
    problems = {
        scope: Problem(
            members[scope],
            after.keys[scope],
            after.gradients[scope],
            settings,
            known.get(scope) or _first_scale(members[scope], settings),
            root=KeptRoot() if settings.passes > 1 else None,
            guards={} if guards is None else guards,
        )
        for scope in scopes
    }
    solutions = dict(solve(list(problems.values())))
    faults += _unsolved(problems, solutions)
    kept: dict[str, Scale] = {}
    for scope, problem in problems.items():
        if scope in known or not settings.relative:
            continue
        step: float | None = problem.scale.step_size
        if settings.relative_step is not None:
            step = _resolved_step(problem, solutions, output_norms or {}, settings.relative_step)
        if step is None:
            continue  # nothing was added: whether that is a fault is seen when the draft is read
        if settings.relative_step is not None:
            problems[scope] = replace(problem, scale=Scale(step, problem.scale.ridge))
            for name in problem.rows:
                solutions[name] = replace(solutions[name], update=solutions[name].update.scaled(step))
        moments = after.gradients[scope]
        if enough_rows(moments.count, moments.mean.shape[0]):
            kept[scope] = problems[scope].scale
    updates = {name: solutions[name].update for name in names_in_order}
    solvers = {name: solution.solver for name, solution in solutions.items() if solution.solver is not None}
    norms = {name: update.norm() for name, update in updates.items()}
    gains = {
        name: -(captured[name].gradients * update.at(captured[name].keys)).sum() for name, update in updates.items()
    }
    return TurnDraft(after, updates, solvers, faults, norms, problems, kept, gains)


def _first_scale(rows: Mapping[str, Rows], settings: MethodSettings) -> Scale:
    """A scope's scale before its step is known: an update is linear in the step, so it is solved with 1."""
    ridge = ridge_for([one.keys for one in rows.values()], settings)
    return Scale(1.0 if settings.step_size is None else settings.step_size, ridge)


def _resolved_step(
    problem: Problem, solutions: Mapping[str, Solution], output_norms: Mapping[str, Tensor], relative_step: float
) -> float | None:
    missing = [name for name in problem.rows if name not in output_norms]
    if missing:
        raise ValueError(f"relative_step needs the norms of the outputs of {', '.join(missing)}")
    return step_for(
        [rows.keys for rows in problem.rows.values()],
        [solutions[name].update for name in problem.rows],
        [output_norms[name] for name in problem.rows],
        relative_step,
    )


def _unsolved(problems: Mapping[str, Problem], solutions: Mapping[str, Solution]) -> list[tuple[str, Tensor]]:
    return [
        (f"site {name}: {unsolvable(solutions[name].update, problem.scale.ridge)}", solutions[name].failed == 0)
        for problem in problems.values()
        for name in problem.rows
    ]


FADE = 0.2
"""Share of ``enough_margin`` over which a token's target fades. Narrow, so that a pass that adds more than this takes a
token to where nothing is left, and a turn ends; not zero, so that nothing jumps."""


def what_is_left(margins: Tensor, enough: float) -> Tensor:
    """How much of each answer token's target a further pass takes.

    1 while the token is less than ``(1 - FADE) enough`` ahead, falling linearly to 0 at ``enough``: a token that is
    learned is held where it is by a target of zero. A turn ends when nothing is left. Because nothing jumps at either
    bound, rounding, which differs with micro-batches and processes, changes results by rounding only.

    Args:
        margins: probability of each answer token less that of the best other token, ``[N]``, between -1 and 1.
        enough: in ``(0, 1]``.

    Returns:
        ``[N]``, float64, between 0 and 1.
    """
    return ((enough - margins.double()) / (FADE * enough)).clamp(0.0, 1.0)


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
