"""A turn's edits divided over the ranks, and their values put together again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableedit_pl.devices import ranks


@dataclass(frozen=True)
class Share:
    """One rank's part of a turn; ranks that hold a layer between them (tensor parallel) have the same.

    Attributes:
        members: its edits, ascending; may be none.
        micro_batches: which of ``members`` (by their place there) go together.
    """

    members: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]


def divide(micro_batches: Sequence[tuple[int, ...]], lengths: Sequence[int], count: int, whole: bool) -> list[Share]:
    """Divide a turn so that the ranks have about equally many tokens.

    Edits stay beside others of their length: the cuts go through the row of micro-batches, not through the turn.

    Args:
        micro_batches: of the whole turn.
        lengths: tokens of each edit.
        count: number of parts.
        whole: cut between micro-batches only, because the loss is averaged over each.

    Returns:
        A share for each rank; every edit is in one.
    """
    units = micro_batches if whole else tuple((i,) for members in micro_batches for i in members)
    total = sum(lengths[i] for unit in units for i in unit)
    owner: dict[int, int] = {}
    before = 0
    for unit in units:
        tokens = sum(lengths[i] for i in unit)
        # The middle of a unit says whose it is: no rank is then more than half a unit above its due.
        place = min(count * (2 * before + tokens) // (2 * total), count - 1)
        owner |= dict.fromkeys(unit, place)
        before += tokens
    shares = []
    for one in range(count):
        members = tuple(sorted(i for i, place in owner.items() if place == one))
        local = {i: place for place, i in enumerate(members)}
        pieces = (tuple(local[i] for i in piece if owner[i] == one) for piece in micro_batches)
        shares.append(Share(members, tuple(piece for piece in pieces if piece)))
    return shares


def gather_edits(own: Tensor, shares: Sequence[Share]) -> Tensor:
    """All edits' values, ``[edits, width]`` in the turn's order, of each rank's, ``[its edits, width]``."""
    if ranks.world() == 1:
        return own
    together = ranks.gather_rows(own, [len(share.members) for share in shares])
    return together[in_turn_order([i for share in shares for i in share.members], together.device)]


def in_turn_order(owners: Sequence[int], device: torch.device) -> Tensor:
    """Where the turn's rows, in its order, stand among those of ``owners``, their edits."""
    return torch.tensor(owners).argsort(stable=True).to(device)
