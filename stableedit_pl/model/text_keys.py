"""A site's inputs on ordinary text: at every token but a prompt's first, whose keys are like no other's."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from stableedit_pl.method.guard import Guard, guard_of
from stableedit_pl.model.encoding import Encoding, collate
from stableedit_pl.model.micro_batches import Batching
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import Site


@torch.no_grad()
def guards_of_text(
    forward: PartialForward,
    sites: Sequence[Site],
    encodings: Sequence[Encoding],
    batching: Batching,
    pad_id: int,
    rank: int,
    weight: float,
    tokens: int,
) -> dict[str, Guard]:
    """What updates of the sites are to leave alone, so that the model goes on saying of a text what it says.

    Args:
        forward: runs the model.
        sites: the edited weights, whole on this process.
        encodings: the text; its first ones, as many as hold ``tokens``.
        batching: puts them together; of no consequence but for memory.
        pad_id: fills padding.
        rank: most directions of a site.
        weight: of the text, relative to a turn's own rows.
        tokens: so many are looked at, or all.

    Returns:
        Site name to its guard, on the CPU.
    """
    keys: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    place: list[Tensor] = []

    def keep(name: str, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        keys[name].append(flat[place[0].to(flat.device).flatten()].float().cpu())

    handles = [site.module.register_forward_pre_hook(_hook(site.name, keep)) for site in sites]
    ends = list(accumulate(len(encoding.input_ids) - 1 for encoding in encodings))
    chosen = encodings[: bisect_left(ends, tokens) + 1]
    try:
        for members in batching([len(encoding.input_ids) for encoding in chosen]):
            batch = collate([chosen[i] for i in members], pad_id, forward.device)
            there = batch.attention_mask.bool()
            there[:, 0] = False
            place[:] = [there]
            forward.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: guard_of(torch.cat(rows), rank, weight) for name, rows in keys.items()}


def _hook(name: str, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(name, inputs[0])

    return hook
