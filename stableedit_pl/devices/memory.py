"""Bytes that the editor needs beside the loaded model, from shapes alone; the reasoning is in docs/memory.md."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from stableedit_pl.method.normalization import Solver
from stableedit_pl.method.statistics import StatisticsScope
from stableedit_pl.method.workspace import workspace_sizes

F32, F64 = 4, 8

KERNELS = 2**16
"""What kernels take whatever the shapes: verdicts, vectors of no account, fixed work areas."""


@dataclass(frozen=True)
class PlannedBytes:
    """Peak bytes of planning and committing a turn, beyond the loaded model, by what they are for.

    Attributes:
        masters: float32 copies of the sites of a coarser model; there between turns too.
        moments: the LN statistics; there between turns too.
        new_moments: the statistics after the turn, beside those before it until the commit.
        rows: keys and value gradients of the turn, float32.
        updates: the turn's updates in factors, and those of the turn before, which its report holds.
        scratch: the largest of the steps that follow one another: moments, inverse root, ridge, sum with the weight.
    """

    masters: int
    moments: int
    new_moments: int
    rows: int
    updates: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def planned_bytes(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    masters: bool = True,
    scope: StatisticsScope = "site",
    solver: Solver | None = "quadrature",
) -> PlannedBytes:
    """Peak bytes of a turn on one device, beyond the model, while it is planned and committed.

    Args:
        shapes: ``(d_in, d_out)`` of each site on the device.
        rows: answer tokens of a turn: edits times target length.
        masters: whether the model is coarser than float32 and ``master_dtype`` is ``float32``.
        scope: the editor's ``statistics_scope``.
        solver: who takes the inverse root; None if no gradients are whitened.
    """
    sharing = Counter(shapes)
    scopes = list(shapes) if scope == "site" else list(sharing)
    moments = sum(F32 * (d_out * d_out + d_out + 2 * d_in) for d_in, d_out in scopes)
    return PlannedBytes(
        masters=sum(F32 * d_in * d_out for d_in, d_out in shapes) if masters else 0,
        moments=moments,
        new_moments=moments,
        rows=sum(F32 * rows * (d_in + d_out) for d_in, d_out in shapes),
        updates=sum(_update_bytes(shape, rows) + _update_bytes(shape, rows, kept=True) for shape in shapes),
        scratch=max(
            _scratch_bytes(shape, rows, sharing[shape] if scope == "shape" else 1, solver) for shape in sharing
        ),
    )


def _update_bytes(shape: tuple[int, int], rows: int, kept: bool = False) -> int:
    """An update's factors and key products; in the dual form one factor is the keys, rows while the turn lasts."""
    d_in, d_out = shape
    if rows >= d_in:
        return F32 * d_in * d_in + F64 * d_in * d_out
    return (F32 * rows * d_in if kept else 0) + F64 * rows * (d_out + rows)


def _scratch_bytes(shape: tuple[int, int], rows: int, sharing: int, solver: Solver | None) -> int:
    d_in, d_out = shape
    rank, together = min(rows, d_in), rows * sharing
    gathered = F32 * together * (d_in + d_out) if sharing > 1 else 0
    # Centred rows; those with the shift between the means, in both widths; the scatter in float64.
    moments = (2 * F32 + F64) * (rows + 1) * max(d_in, d_out) + F64 * d_out * d_out
    # Normalized keys, centred and white gradients.
    root = gathered + F32 * together * (d_in + 2 * d_out)
    square, tall = d_out * d_out, together * d_out
    if solver == "quadrature":  # system, factor and the kernel's copy; right side, sum, solution and the kernel's copy
        root += F64 * (3 * square + 4 * tall)
    elif solver == "eigh":  # covariance and vectors, beside them LAPACK's two matrices, then the rows on their way
        root += F64 * (2 * square + max(2 * square, 3 * tall))
    # Targets; keys and targets in float64; the system, its factor and the kernel's copy; what the primal form adds.
    primal = F64 * rank * d_out if rank < rows else 0
    ridge = F32 * together * d_out + F64 * (rows * (d_in + d_out) + 3 * rank * rank + rank * d_out + primal)
    # Either layout: a Linear stores [d_out, d_in], a Conv1D [d_in, d_out].
    add = max(sum(workspace_sizes(stored, rank)) for stored in (shape, shape[::-1]))
    return KERNELS + max(moments, root, ridge, F64 * add)
