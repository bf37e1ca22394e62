"""Forward passes of a model whose layers are gathered from all ranks (FSDP2): all must run the same number.

Ranks have different edits to score, in different numbers of batches, and decode answers of different lengths. So each
says before a pass that it runs one; a rank that is done keeps the others company with passes over nothing, until all
are done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from stableedit_pl.devices import ranks
from stableedit_pl.devices.weight_shards import settle


def gathered_for_forward(model: Any) -> bool:
    """Whether a forward pass of this model needs all ranks."""
    return isinstance(model, FSDPModule)


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Let ranks run different numbers of forward passes inside; does nothing for a model that needs no others.

    Args:
        model: called, or asked to ``generate``, without gradients.
    """
    if not gathered_for_forward(model):
        yield
        return

    def announce(_module: Any, _args: Any) -> None:
        ranks.largest(1)

    handle = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while ranks.largest(0):
        keep_company(model)


@torch.no_grad()
def keep_company(model: Any) -> None:
    """A forward pass over one token, for the ranks that have something to run."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    settle(model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits)
