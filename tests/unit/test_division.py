"""Which rank solves which site, what is sent, and that all end with the same bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import absolute
from torch import Tensor

from stableedit_pl.devices import ranks
from stableedit_pl.devices.division import SPEEDS, Division, divided, operations, solve_together
from stableedit_pl.method.planning import draft_turn
from stableedit_pl.method.problem import Problem, solve_all
from stableedit_pl.method.scales import Scale
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics, Rows


@dataclass
class Shape:
    name: str
    d_in: int
    d_out: int


SITES = [Shape("a", 12, 4), Shape("b", 12, 4), Shape("c", 5, 6), Shape("d", 30, 8)]
"""``c`` is solved in its primal form: there are more rows than inputs."""


def rows_of_a_turn(n: int = 7) -> dict[str, Rows]:
    generator = torch.Generator().manual_seed(1)
    return {
        site.name: Rows(torch.randn(n, site.d_in, generator=generator), torch.randn(n, site.d_out, generator=generator))
        for site in SITES
    }


def problems(scope: str = "site", settings: MethodSettings | None = None) -> list[Problem]:
    given: list[Problem] = []

    def keep(turn: Any) -> dict[str, Any]:
        given.extend(turn)
        return solve_all(turn)

    statistics = LNStatistics.empty(SITES, scope)  # type: ignore[arg-type]
    draft_turn(rows_of_a_turn(), statistics, settings or absolute(step_size=0.1), solve=keep)
    return given


class Wire:
    """A run of several ranks, one after the other: what one sends the next ones receive."""

    def __init__(self, count: int) -> None:
        self.count, self.now = count, 0
        self.sent: dict[int, Tensor] = {}
        self.solved: list[tuple[int, str]] = []

    @contextmanager
    def connected(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "world", lambda: self.count)
            patch.setattr(ranks, "rank", lambda: self.now)
            patch.setattr(ranks, "device", lambda: torch.device("cpu"))
            patch.setattr(ranks, "send_to_all", self.send)
            real = Problem.solve

            def solve(problem: Problem) -> Any:
                self.solved += [(self.now, name) for name in problem.rows]
                return real(problem)

            patch.setattr(Problem, "solve", solve)
            yield

    def send(self, numbers: Tensor, source: int) -> None:
        if source == self.now:
            self.sent[source] = numbers.clone()
        elif source in self.sent:
            assert numbers.shape == self.sent[source].shape and numbers.dtype == self.sent[source].dtype
            numbers.copy_(self.sent[source])
        else:
            numbers.zero_()  # that rank has not had its turn yet; asked again below


def on_every_rank(monkeypatch: pytest.MonkeyPatch, count: int, turn: list[Problem]) -> tuple[Wire, list[Any]]:
    """Each rank's solutions, once everything has been sent."""
    wire = Wire(count)
    with wire.connected(monkeypatch):
        for wire.now in range(count):
            solve_together(turn, "always")
        first = list(wire.solved)
        everywhere = []
        for wire.now in range(count):
            everywhere.append(solve_together(turn, "always"))
    wire.solved = first
    return wire, everywhere


@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_rank_gets_the_bytes_that_one_process_computes(
    monkeypatch: pytest.MonkeyPatch, scope: str, normalization: str, count: int
) -> None:
    turn = problems(scope, absolute(normalization, step_size=0.1))  # type: ignore[arg-type]
    expected = solve_all(turn)
    wire, everywhere = on_every_rank(monkeypatch, count, turn)
    assert sorted(name for _, name in wire.solved) == ["a", "b", "c", "d"], "each site is solved once"
    assert len({rank for rank, _ in wire.solved}) == min(count, len(turn))
    for solved in everywhere:
        assert solved.keys() == expected.keys()
        for name, solution in solved.items():
            there = expected[name]
            assert torch.equal(solution.update.left, there.update.left)
            assert torch.equal(solution.update.right, there.update.right)
            assert solution.update.right.dtype == torch.float64
            assert solution.update.right.stride() == there.update.right.stride()
            assert torch.equal(solution.update.norm(), there.update.norm())
            assert (solution.update.left_gram is None) == (there.update.left_gram is None) == (name == "c")
            assert solution.solver == there.solver and float(solution.failed) == float(there.failed) == 0


def test_a_failed_factorization_reaches_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = problems()
    turn[1].rows["b"].keys.fill_(float("nan"))
    _, everywhere = on_every_rank(monkeypatch, 2, turn)
    for solved in everywhere:
        assert [name for name, solution in solved.items() if float(solution.failed)] == ["b"]


def test_never_and_one_process_solve_everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = problems()
    monkeypatch.setattr(ranks, "send_to_all", lambda *_: pytest.fail("nothing is to be sent"))
    assert solve_together(turn, "always").keys() == {"a", "b", "c", "d"}
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert solve_together(turn, "never").keys() == {"a", "b", "c", "d"}


def wide(d_out: int, count: int, n: int = 300, d_in: int = 64) -> list[Problem]:
    """Problems of one shape whose numbers nobody looks at."""
    sites = [Shape(f"s{i}", d_in, d_out) for i in range(count)]
    given = {s.name: Rows(torch.ones(n, d_in), torch.ones(n, d_out)) for s in sites}
    statistics = LNStatistics.empty(sites, "site").updated(given)
    settings = absolute()
    return [Problem({s.name: given[s.name]}, statistics.keys[s.name], statistics.gradients[s.name], settings, Scale(1e-6, 10.0)) for s in sites]  # fmt: skip  # noqa: E501


def test_work_is_divided_evenly_and_the_largest_goes_first() -> None:
    unequal = [*wide(16, 3), *wide(128, 1), *wide(16, 2)]
    division = divided(unequal, 2)
    assert division.owners[3] == 0 and [o for i, o in enumerate(division.owners) if i != 3] == [1] * 5
    total, largest = division.operations
    assert total == pytest.approx(sum(map(operations, unequal))) and largest == pytest.approx(operations(unequal[3]))
    assert divided(wide(32, 7), 4).owners == (0, 1, 2, 3, 0, 1, 2)


def test_bytes_are_those_that_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = problems()
    wire, _ = on_every_rank(monkeypatch, 3, turn)
    assert divided(turn, 3).bytes == sum(8 * sent.numel() for sent in wire.sent.values())


def test_auto_divides_where_it_pays() -> None:
    """One site is nothing to divide; two wide ones are worth their transfer, two narrow ones are not."""
    for kind in ("cpu", "cuda"):
        assert not divided(wide(512, 1), 2).pays(SPEEDS[kind])
        assert not divided(wide(8, 2, n=4), 2).pays(SPEEDS[kind])
    assert divided(wide(512, 2), 2).pays(SPEEDS["cpu"])
    # The seven sites of an 8B model on eight GPUs: 7 x 330 GFLOP against 74 MB.
    assert Division(tuple(range(7)), (2.3e12, 3.3e11), 74_000_000).pays(SPEEDS["cuda"])
