"""Fifty turns by each solver of the inverse root: one result, and it is the reference's."""

from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
import torch
from tiny import absolute, relative_difference
from torch import Tensor, nn

from stableedit_pl.method.planning import plan_turn
from stableedit_pl.method.statistics import LNStatistics, Rows, Shaped

D_IN, D_OUT, TURNS = 64, 40, 50


class Shape:
    d_in, d_out = D_IN, D_OUT

    def __init__(self, name: str) -> None:
        self.name = name


SITES: list[Shaped] = [Shape("a"), Shape("b")]


def stream(turns: int = TURNS) -> Iterator[dict[str, Rows]]:
    """Rows like a model's: off the origin, gradients in few directions, their size drifting; turns of all lengths."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D_OUT, D_OUT, generator=generator) * torch.logspace(0, -3, D_OUT)[:, None]
    for turn in range(turns):
        n = [12, 3, 1, 70][turn % 4]
        size = 1e-4 * (1 + turn / 10)
        yield {
            site.name: Rows(
                torch.randn(n, D_IN, generator=generator) + 0.5,
                torch.randn(n, D_OUT, generator=generator) @ mixing * size,
            )
            for site in SITES
        }


def accumulated(solver: Any, scope: Any, prior: float, turns: int = TURNS) -> dict[str, Tensor]:
    """Sum of all updates, float64 ``[d_in, d_out]``."""
    settings = absolute(step_size=1e-2, prior_strength=prior, whitening_solver=solver)
    statistics = LNStatistics.empty(SITES, scope)
    total = {site.name: torch.zeros(D_IN, D_OUT, dtype=torch.float64) for site in SITES}
    for rows in stream(turns):
        plan = plan_turn(rows, statistics, settings)
        assert set(plan.solvers.values()) <= {solver}
        statistics = plan.statistics
        for name, update in plan.updates.items():
            total[name] += update.left.T.double() @ update.right
    return total


@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize("prior", [1.0, 0.03])
def test_all_solvers_agree_with_each_other_and_the_reference_over_fifty_turns(scope: Any, prior: float) -> None:
    modules: dict[str, nn.Module] = {site.name: nn.Linear(D_IN, D_OUT) for site in SITES}
    oracle = ref.scoped_statistics(modules, scope)
    expected = {site.name: torch.zeros(D_OUT, D_IN, dtype=torch.float64) for site in SITES}
    for rows in stream():
        for name, given in rows.items():
            oracle[name].add(given.keys, given.gradients)
        deltas = ref.turn_updates(
            modules,
            {name: (given.keys.double(), given.gradients.double()) for name, given in rows.items()},
            oracle,
            normalization="whiten",
            scales=dict.fromkeys(rows, ref.Scale(1e-2, 10.0)),
            prior_strength=prior,
            eigenvalue_floor=0.0,
        )
        for name, delta in deltas.items():
            expected[name] += delta
    by_eigh, by_quadrature = accumulated("eigh", scope, prior), accumulated("quadrature", scope, prior)
    for name in expected:
        assert 0 < relative_difference(by_quadrature[name], by_eigh[name]) < 3e-6
        # Against float64 moments; a weak prior leaves more of the float32 moments' rounding in the root.
        assert relative_difference(by_eigh[name], expected[name].T) < 1e-4
        assert relative_difference(by_quadrature[name], expected[name].T) < 1e-4


def test_another_root_would_be_noticed() -> None:
    """Negative control: the prior's strength is what a solver could get wrong without failing."""
    one, other = accumulated("quadrature", "site", 1.0, 8), accumulated("quadrature", "site", 1.1, 8)
    assert relative_difference(one["a"], other["a"]) > 1e-3


def test_sites_that_share_moments_are_whitened_as_each_alone() -> None:
    """Stacked for one factorization, and taken apart again."""
    rows = next(stream())
    shared = LNStatistics.empty(SITES, "shape").updated(rows)
    settings = absolute(step_size=1e-2, whitening_solver="quadrature")
    both = plan_turn(rows, shared, settings)
    swapped = plan_turn({name: rows[name] for name in reversed(rows)}, shared, settings)
    assert list(both.updates) == ["a", "b"] and list(swapped.updates) == ["b", "a"]
    for name in rows:
        assert relative_difference(both.updates[name].right, swapped.updates[name].right) < 1e-5
    assert relative_difference(both.updates["a"].right, both.updates["b"].right) > 0.1
