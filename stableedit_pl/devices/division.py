"""A turn's algebra divided over the ranks: each scope's root and ridge at one of them, the solutions sent to all.

Every rank has all rows and moments of the turn, so that any of them can solve any problem. The update of a site leaves
its solver in factors: one is the keys, which all have; the other, ``[N, d_out]``, is what has to be sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stableedit_pl.devices import ranks
from stableedit_pl.method.inverse_root import root_operations
from stableedit_pl.method.problem import Problem, Solution, solve_all
from stableedit_pl.method.ridge import SiteUpdate, ridge_operations
from stableedit_pl.method.statistics import Rows

DivideAlgebra = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Speed:
    """What a kind of device is taken to be able to do, where ``auto`` has to guess.

    Attributes:
        operations: float64 operations per second, of a factorization.
        transfer: bytes per second from one rank to all others.
        start: seconds that a broadcast takes whatever its size.
    """

    operations: float
    transfer: float
    start: float


SPEEDS = {"cpu": Speed(2e10, 5e8, 1e-3), "cuda": Speed(5e12, 1e10, 5e-5)}
"""One CPU core with gloo; a GPU with NCCL, by the slower of what is sold for such work."""


NODES = 10
"""Of a quadrature, about: they grow with the logarithm of the rows seen."""


@dataclass(frozen=True)
class Division:
    """Which rank solves which problem.

    Attributes:
        owners: a rank for each problem.
        operations: of all problems, and of the busiest rank's.
        bytes: sent, all solutions together.
    """

    owners: tuple[int, ...]
    operations: tuple[float, float]
    bytes: int

    def pays(self, speed: Speed) -> bool:
        """Whether the time saved is worth the time it takes to send the solutions."""
        saved = (self.operations[0] - self.operations[1]) / speed.operations
        return saved > self.bytes / speed.transfer + len(set(self.owners)) * speed.start


def divided(problems: Sequence[Problem], count: int) -> Division:
    """Give each problem, the largest first, to the rank with the least to do.

    Args:
        problems: of a turn.
        count: number of ranks.
    """
    work = [operations(problem) for problem in problems]
    load = [0.0] * count
    owners = [0] * len(problems)
    for place in sorted(range(len(problems)), key=lambda i: (-work[i], i)):
        owners[place] = min(range(count), key=lambda one: (load[one], one))
        load[owners[place]] += work[place]
    size = sum(8 * _numbers(problem) for problem in problems)
    return Division(tuple(owners), (sum(work), max(load, default=0.0)), size)


def operations(problem: Problem) -> float:
    """About how many operations a problem takes (docs/performance.md): its root, and each site's ridge system."""
    d_out = problem.gradient_moments.mean.shape[0]
    together = sum(len(rows.keys) for rows in problem.rows.values())
    solver = problem.solver()
    root = 0.0 if solver is None else root_operations(together, d_out, None if solver == "eigh" else NODES)
    return root + sum(ridge_operations(*_sizes(rows), d_out) for rows in problem.rows.values())


def _sizes(rows: Rows) -> tuple[int, int]:
    n, d_in = rows.keys.shape
    return n, d_in


def solve_together(problems: Sequence[Problem], divide: DivideAlgebra = "auto") -> dict[str, Solution]:
    """Solve a turn's problems on all ranks together; every rank gets every solution, the same bytes.

    All ranks hold the same rows and moments, and so decide alike.

    Args:
        problems: of a turn, the same everywhere.
        divide: ``auto`` where it is faster, ``always``, or ``never``: every rank solves everything.

    Raises:
        RanksError: if a rank is lost.
    """
    # What leaves a solver under a guard has another left factor than the keys, as large as they are.
    if ranks.world() == 1 or divide == "never" or any(problem.guards for problem in problems):
        return solve_all(problems)
    division = divided(problems, ranks.world())
    if divide == "auto" and not division.pays(SPEEDS.get(ranks.device().type, SPEEDS["cuda"])):
        return solve_all(problems)
    solved: dict[str, Solution] = {}
    own = [problem for problem, owner in zip(problems, division.owners, strict=True) if owner == ranks.rank()]
    mine = solve_all(own)
    for owner in sorted(set(division.owners)):
        theirs = [problem for problem, one in zip(problems, division.owners, strict=True) if one == owner]
        if owner == ranks.rank():
            packed = _packed([mine[name] for problem in theirs for name in problem.rows])
        else:
            size = sum(map(_numbers, theirs))
            packed = torch.empty(size, dtype=torch.float64, device=ranks.device())
        ranks.send_to_all(packed, owner)
        solved |= _unpacked(packed, theirs)
    return solved


def _shapes(problem: Problem) -> list[tuple[str, tuple[int, int, int]]]:
    """Site name to rows of its right factor, their width, and the side of the key products that come with it, or 0."""
    width = problem.gradient_moments.mean.shape[0]
    shapes = []
    for name, rows in problem.rows.items():
        n, d_in = _sizes(rows)
        shapes.append((name, (n, width, n) if n < d_in else (d_in, width, 0)))
    return shapes


def _numbers(problem: Problem) -> int:
    """Numbers of a problem's solutions on their way: right factors, key products, verdicts."""
    return sum(height * width + side * side + 1 for _, (height, width, side) in _shapes(problem))


def _packed(solutions: Sequence[Solution]) -> Tensor:
    """Solutions as one row of float64 numbers, where collectives take them."""
    pieces: list[Tensor] = []
    for solution in solutions:
        gram = solution.update.left_gram
        # Columns one after another, as the solver leaves them: products round by their factors' layout, too.
        pieces += [solution.update.right.T.flatten(), *([] if gram is None else [gram.flatten()])]
        pieces.append(solution.failed.reshape(1).double())
    return torch.cat([piece.to(ranks.device()) for piece in pieces])


def _unpacked(packed: Tensor, problems: Sequence[Problem]) -> dict[str, Solution]:
    """The inverse of :func:`_packed`; every rank reads what was sent, its owner too: the same bytes everywhere."""
    solved: dict[str, Solution] = {}
    start = 0
    for problem in problems:
        solver = problem.solver()
        for name, (height, width, side) in _shapes(problem):
            keys = problem.rows[name].keys
            where = keys.device
            end = start + height * width
            # Copies, so that each begins where an allocation does, as it would had it been solved here.
            right = packed[start:end].to(where, copy=True).reshape(width, height).T
            gram = packed[end : end + side * side].to(where, copy=True).reshape(side, side) if side else None
            failed = packed[end + side * side].to(where)
            left = keys if side else torch.eye(height, dtype=keys.dtype, device=where)
            solved[name] = Solution(SiteUpdate(left, right, gram), failed, solver)
            start = end + side * side + 1
    return solved
