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
        passes: what further passes hold beside that: the weights to return to where no master has them, eigenvectors,
            the rows of two more captures, the update of the pass at hand.
        scratch: the largest of the steps that follow one another: moments, inverse root, ridge, sum with the weight.
    """

    masters: int
    moments: int
    new_moments: int
    rows: int
    updates: int
    passes: int
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
    passes: int = 1,
) -> PlannedBytes:
    """Peak bytes of a turn on one device, beyond the model, while it is planned and committed.

    Args:
        shapes: ``(d_in, d_out)`` of each site on the device.
        rows: answer tokens of a turn: edits times target length.
        masters: whether the model is coarser than float32 and ``master_dtype`` is ``float32``.
        scope: the editor's ``statistics_scope``.
        solver: who takes the inverse root; None if no gradients are whitened.
        passes: the editor's setting.
    """
    sharing = Counter(shapes)
    scopes = list(shapes) if scope == "site" else list(sharing)
    moments = sum(F32 * (d_out * d_out + d_out + 2 * d_in) for d_in, d_out in scopes)
    return PlannedBytes(
        masters=sum(F32 * d_in * d_out for d_in, d_out in shapes) if masters else 0,
        moments=moments,
        new_moments=moments,
        rows=sum(F32 * rows * (d_in + d_out) for d_in, d_out in shapes),
        updates=sum(
            _update_bytes(shape, rows, passes > 1, passes) + _update_bytes(shape, rows, True, passes)
            for shape in shapes
        ),
        passes=_passes_bytes(shapes, scopes, rows, masters, solver, passes) if passes > 1 else 0,
        scratch=max(
            _scratch_bytes(shape, rows, sharing[shape] if scope == "shape" else 1, solver, passes) for shape in sharing
        ),
    )


def _passes_bytes(
    shapes: Sequence[tuple[int, int]],
    scopes: Sequence[tuple[int, int]],
    rows: int,
    masters: bool,
    solver: Solver | None,
    passes: int,
) -> int:
    before = 0 if masters else sum(F32 * d_in * d_out for d_in, d_out in shapes)
    roots = sum(F64 * (d_out * d_out + d_out) for _, d_out in scopes) if solver == "eigh" else 0
    captures = (min(passes, 3) - 1) * sum(F32 * rows * (d_in + d_out) for d_in, d_out in shapes)
    first_and_own = 2 * sum(_update_bytes(shape, rows) for shape in shapes)
    return before + roots + captures + first_and_own


def _update_bytes(shape: tuple[int, int], rows: int, kept: bool = False, passes: int = 1) -> int:
    """An update's factors and key products; in the dual form one factor is the keys, rows while the turn lasts."""
    d_in, d_out = shape
    if rows >= d_in:
        return F32 * d_in * d_in + F64 * d_in * d_out
    if passes > 1:  # their factors one below the other, without key products
        return passes * rows * (F32 * d_in + F64 * d_out)
    return (F32 * rows * d_in if kept else 0) + F64 * rows * (d_out + rows)


def _scratch_bytes(shape: tuple[int, int], rows: int, sharing: int, solver: Solver | None, passes: int) -> int:
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
    all_passes = rank if rank < rows else rank * passes
    add = F64 * max(sum(workspace_sizes(stored, all_passes)) for stored in (shape, shape[::-1]))
    # The norm of all passes together: both factors in float64, two products and theirs.
    norm = F64 * all_passes * (d_in + d_out + 3 * all_passes) if passes > 1 else 0
    # One site's factors, while those of a pass are put below those of the passes before.
    joined = _update_bytes(shape, rows, True, passes) if passes > 1 else 0
    return KERNELS + max(moments, root, ridge, add, norm, joined)
