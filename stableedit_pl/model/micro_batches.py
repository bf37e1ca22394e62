"""Which edits of a turn go through the model together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MicroBatches = tuple[tuple[int, ...], ...]
"""Indices of a turn's edits, one tuple per forward pass; every edit once."""

PADDING = 0.1
"""Largest share of padding among all tokens of a turn."""

NEGLIGIBLE = 64
"""Padded tokens that cost less than another pass over the weights, whatever their share."""


@dataclass(frozen=True)
class Batching:
    """How a turn's edits are put together.

    Attributes:
        tokens: most tokens of a forward pass, padding included.
        size: most edits of a forward pass; None for no such limit.
        consecutive: pieces of exactly ``size`` edits in the turn's order, as a loss averaged over them requires.
    """

    tokens: int
    size: int | None
    consecutive: bool = False

    def __call__(self, lengths: Sequence[int]) -> MicroBatches:
        """The micro-batches of edits with so many tokens each."""
        if self.consecutive:
            assert self.size is not None
            return in_order(len(lengths), self.size)
        return by_length(lengths, self.tokens, self.size)


def in_order(count: int, size: int) -> MicroBatches:
    """Consecutive pieces of ``size`` indices; the last may be shorter."""
    return tuple(tuple(range(start, min(start + size, count))) for start in range(0, count, size))


def by_length(lengths: Sequence[int], tokens: int | None = None, size: int | None = None) -> MicroBatches:
    """As few pieces of similar length as keep padding under ``PADDING`` (or ``NEGLIGIBLE``), each within a budget.

    Every piece costs a pass over the weights and every padded token its arithmetic; one piece for all would waste the
    second, one per length the first.

    Args:
        lengths: tokens of each edit.
        tokens: most tokens of a piece, padding included; a longer edit is a piece of its own.
        size: most edits of a piece.
    """
    if not lengths:
        return ()
    members: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        members.setdefault(length, []).append(i)
    pieces = []
    for group in _groups(Counter(lengths)):
        indices = [i for length in group for i in members[length]]
        limit = min(size or len(indices), max((tokens or len(indices) * group[-1]) // group[-1], 1))
        count = -(-len(indices) // limit)
        # Equal pieces: a full one and a remainder of one edit cost as much as two halves, and need more memory.
        ends = [len(indices) * k // count for k in range(count + 1)]
        pieces += [tuple(indices[start:end]) for start, end in pairwise(ends)]
    return tuple(pieces)


def _groups(counts: Counter[int]) -> list[list[int]]:
    """Ascending lengths in the fewest consecutive groups whose padding is little enough.

    Dynamic programming: ``best[j]`` is the fewest tokens, padding included, of the ``j`` shortest lengths in so many
    groups.
    """
    lengths = sorted(counts)
    n, real = len(lengths), sum(length * count for length, count in counts.items())
    before = [0]
    for length in lengths:
        before.append(before[-1] + counts[length])
    best: list[float] = [0.0] + [float("inf")] * n
    cuts: list[list[int]] = []
    while True:
        candidates = [
            min((best[i] + lengths[j - 1] * (before[j] - before[i]), i) for i in range(j)) for j in range(1, n + 1)
        ]
        best = [float("inf")] + [cost for cost, _ in candidates]
        cuts.append([0] + [start for _, start in candidates])
        if real >= (1 - PADDING) * best[n] or best[n] - real <= NEGLIGIBLE:
            break
    groups, end = [], n
    for starts in reversed(cuts):
        groups.append(lengths[starts[end] : end])
        end = starts[end]
    return groups[::-1]
