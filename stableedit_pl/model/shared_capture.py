"""Capture by several ranks: each runs its share of the turn's edits, and all receive everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stableedit_pl.devices import ranks
from stableedit_pl.devices.lockstep import gathered_for_forward
from stableedit_pl.devices.shares import Share, divide, gather_edits, in_turn_order
from stableedit_pl.method.statistics import Rows, moved
from stableedit_pl.model.capture import Captured, LossReduction, Pass, capture
from stableedit_pl.model.encoding import Encoding
from stableedit_pl.model.micro_batches import MicroBatches
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import Site


def capture_together(
    forward: PartialForward,
    sites: Sequence[Site],
    encodings: Sequence[Encoding],
    micro_batches: MicroBatches,
    pad_id: int,
    loss_reduction: LossReduction,
    earlier: Sequence[Pass] | None = None,
) -> tuple[Captured, list[Share]]:
    """As :func:`stableedit_pl.model.capture.capture`, each rank running its share and all receiving everything.

    Rows have the site's whole width, also where ranks hold its inputs or outputs in parts. ``earlier`` are the forward
    passes of this rank's share.

    Returns:
        Rows and measurements of the whole turn, in its order, the same bytes on every rank, but the passes of this
        rank's share alone; and the shares.
    """
    lengths = [len(encoding.input_ids) for encoding in encodings]
    shares = divide(micro_batches, lengths, ranks.parts(), whole=loss_reduction == "micro_batch_mean")
    if ranks.world() == 1:
        return capture(forward, sites, encodings, micro_batches, pad_id, loss_reduction, earlier), shares
    share = shares[ranks.part()]
    with ranks.noticing_losses(among_others=True):
        if share.members:
            own = [encodings[i] for i in share.members]
            captured = capture(forward, sites, own, share.micro_batches, pad_id, loss_reduction, earlier)
        else:
            captured = _nothing(forward, sites)
        if gathered_for_forward(forward.model):
            # Others need this rank for every layer, there and back: it runs as many passes, and drops what they give.
            shortest = encodings[min(range(len(encodings)), key=lengths.__getitem__)]
            for _ in range(len(share.micro_batches), max(len(one.micro_batches) for one in shares)):
                capture(forward, sites, [shortest], ((0,),), pad_id, loss_reduction)
    captured.squares = {site.name: _whole_square(captured, site) for site in sites}
    captured.rows = {site.name: _whole(captured.rows[site.name], site) for site in sites}
    answers = [len(encoding.target_ids) for encoding in encodings]
    counts = [sum(answers[i] for i in one.members) for one in shares]
    owners = [i for one in shares for i in one.members for _ in range(answers[i])]
    assert captured.margins is not None
    parts = [
        part
        for site in sites
        for rows in (captured.rows[site.name],)
        for part in (rows.keys, rows.gradients, captured.squares[site.name])
    ] + [captured.margins]
    widths = [part.shape[1] for part in parts]
    # One collective for all sites: those of a placed model meet where collectives are.
    devices = {part.device for part in parts}
    meeting = ranks.device() if len(devices) > 1 else devices.pop()
    together = ranks.gather_rows(torch.cat([moved(part, meeting) for part in parts], dim=1), counts)
    ordered = torch.split(together[in_turn_order(owners, together.device)], widths, dim=1)
    rows = {
        site.name: Rows(
            moved(ordered[3 * place].contiguous(), parts[3 * place].device),
            moved(ordered[3 * place + 1].contiguous(), parts[3 * place + 1].device),
        )
        for place, site in enumerate(sites)
    }
    squares = {
        site.name: moved(ordered[3 * place + 2].contiguous(), parts[3 * place + 2].device)
        for place, site in enumerate(sites)
    }
    measured = gather_edits(captured.measured.T, shares).T.contiguous()
    margins = moved(ordered[-1].contiguous(), captured.margins.device)
    return Captured(rows, measured, captured.passes, squares, margins), shares


def _whole(rows: Rows, site: Site) -> Rows:
    """Rows of the site's whole width; ranks of a team have the same edits, and may each have some of the columns."""

    def widened(own: Tensor, width: int) -> Tensor:
        return own if own.shape[1] == width else ranks.gather_columns(own, width)

    return Rows(widened(rows.keys, site.d_in), widened(rows.gradients, site.d_out))


def _whole_square(captured: Captured, site: Site) -> Tensor:
    """Squared norms of a site's whole outputs; before rows are widened, whose width says who has what."""
    own = captured.squares[site.name]
    divided = captured.rows[site.name].gradients.shape[1] != site.d_out
    return ranks.gather_columns(own, ranks.team_size()).sum(dim=1, keepdim=True) if divided else own


def _nothing(forward: PartialForward, sites: Sequence[Site]) -> Captured:
    """What a rank without edits captured."""

    def empty(site: Site, width: int) -> Tensor:
        return torch.empty((0, width), dtype=torch.float32, device=site.weight.device)

    rows = {site.name: Rows(empty(site, site.d_in), empty(site, site.d_out)) for site in sites}
    measured = torch.empty((2, 0), dtype=torch.float32, device=forward.device)
    squares = {site.name: empty(site, 1) for site in sites}
    return Captured(rows, measured, [], squares, measured.new_empty((0, 1)))
