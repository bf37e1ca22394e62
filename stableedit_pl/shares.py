"""A turn's edits divided over the ranks, and what the ranks captured put together again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableedit_pl import ranks
from stableedit_pl.capture import Captured, LossReduction, capture
from stableedit_pl.encoding import Encoding
from stableedit_pl.lockstep import gathered_for_forward
from stableedit_pl.micro_batches import MicroBatches
from stableedit_pl.partial_forward import PartialForward
from stableedit_pl.sites import Site
from stableedit_pl.statistics import Rows, moved


@dataclass(frozen=True)
class Share:
    """One rank's part of a turn; ranks that hold a layer between them (tensor parallel) have the same.

    Attributes:
        members: its edits, ascending; may be none.
        micro_batches: which of ``members`` (by their place there) go together.
    """

    members: tuple[int, ...]
    micro_batches: MicroBatches


def divide(micro_batches: MicroBatches, lengths: Sequence[int], count: int, whole: bool) -> list[Share]:
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


def capture_together(
    forward: PartialForward,
    sites: Sequence[Site],
    encodings: Sequence[Encoding],
    micro_batches: MicroBatches,
    pad_id: int,
    loss_reduction: LossReduction,
) -> tuple[Captured, list[Share]]:
    """As :func:`stableedit_pl.capture.capture`, each rank running its share and all receiving everything.

    Rows have the site's whole width, also where ranks hold its inputs or outputs in parts.

    Returns:
        Rows and measurements of the whole turn, in its order, the same bytes on every rank, but the passes of this
        rank's share alone; and the shares.
    """
    lengths = [len(encoding.input_ids) for encoding in encodings]
    shares = divide(micro_batches, lengths, ranks.parts(), whole=loss_reduction == "micro_batch_mean")
    if ranks.world() == 1:
        return capture(forward, sites, encodings, micro_batches, pad_id, loss_reduction), shares
    share = shares[ranks.part()]
    with ranks.noticing_losses(among_others=True):
        if share.members:
            own = [encodings[i] for i in share.members]
            captured = capture(forward, sites, own, share.micro_batches, pad_id, loss_reduction)
        else:
            captured = _nothing(forward, sites)
        if gathered_for_forward(forward.model):
            # Others need this rank for every layer, there and back: it runs as many passes, and drops what they give.
            shortest = encodings[min(range(len(encodings)), key=lengths.__getitem__)]
            for _ in range(len(share.micro_batches), max(len(one.micro_batches) for one in shares)):
                capture(forward, sites, [shortest], ((0,),), pad_id, loss_reduction)
    captured.rows = {site.name: _whole(captured.rows[site.name], site) for site in sites}
    answers = [len(encoding.target_ids) for encoding in encodings]
    counts = [sum(answers[i] for i in one.members) for one in shares]
    owners = [i for one in shares for i in one.members for _ in range(answers[i])]
    parts = [part for site in sites for part in (captured.rows[site.name].keys, captured.rows[site.name].gradients)]
    widths = [part.shape[1] for part in parts]
    # One collective for all sites: those of a placed model meet where collectives are.
    devices = {part.device for part in parts}
    meeting = ranks.device() if len(devices) > 1 else devices.pop()
    together = ranks.gather_rows(torch.cat([moved(part, meeting) for part in parts], dim=1), counts)
    ordered = torch.split(together[_order(owners, together.device)], widths, dim=1)
    rows = {
        site.name: Rows(
            moved(ordered[2 * place].contiguous(), parts[2 * place].device),
            moved(ordered[2 * place + 1].contiguous(), parts[2 * place + 1].device),
        )
        for place, site in enumerate(sites)
    }
    return Captured(rows, gather_edits(captured.measured.T, shares).T.contiguous(), captured.passes), shares


def gather_edits(own: Tensor, shares: Sequence[Share]) -> Tensor:
    """All edits' values, ``[edits, width]`` in the turn's order, of each rank's, ``[its edits, width]``."""
    if ranks.world() == 1:
        return own
    together = ranks.gather_rows(own, [len(share.members) for share in shares])
    return together[_order([i for share in shares for i in share.members], together.device)]


def _order(owners: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(owners).argsort(stable=True).to(device)


def _whole(rows: Rows, site: Site) -> Rows:
    """Rows of the site's whole width; ranks of a team have the same edits, and may each have some of the columns."""

    def widened(own: Tensor, width: int) -> Tensor:
        return own if own.shape[1] == width else ranks.gather_columns(own, width)

    return Rows(widened(rows.keys, site.d_in), widened(rows.gradients, site.d_out))


def _nothing(forward: PartialForward, sites: Sequence[Site]) -> Captured:
    """What a rank without edits captured."""

    def empty(site: Site, width: int) -> Tensor:
        return torch.empty((0, width), dtype=torch.float32, device=site.weight.device)

    rows = {site.name: Rows(empty(site, site.d_in), empty(site, site.d_out)) for site in sites}
    return Captured(rows, torch.empty((2, 0), dtype=torch.float32, device=forward.device))
