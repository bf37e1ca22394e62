"""What a search tries: sites from the model's own structure, and settings without a scale."""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stableedit_pl.model.sites import editable_shapes

STEPS, RIDGES, PASSES = (0.03, 0.1, 0.3), (0.001, 0.01, 0.1), (5, 10, 20)

WINDOWS = 4
"""Runs of layers that are tried beside the configured sites."""

SHARE = 4 / 30
"""Part of the layers that a run has."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    Attributes:
        sites: patterns, as the editor takes them.
        relative_step: see :class:`stableedit_pl.method.settings.MethodSettings`; likewise the others.
        relative_ridge: see there.
        passes: see there.
    """

    sites: tuple[str, ...]
    relative_step: float
    relative_ridge: float
    passes: int

    def settings(self) -> dict[str, Any]:
        """As an editor's arguments; the absolute forms are taken back."""
        return {
            "sites": list(self.sites),
            "step_size": None,
            "ridge": None,
            "relative_step": self.relative_step,
            "relative_ridge": self.relative_ridge,
            "passes": self.passes,
        }


def site_windows(model: nn.Module, hidden_size: int) -> list[tuple[str, ...]]:
    """Runs of consecutive layers of the projection that ends each layer's MLP, in the model's upper half.

    The projection is what maps something wider to the hidden state, once in each layer.

    Args:
        model: a causal language model.
        hidden_size: width of its hidden state.

    Returns:
        Patterns, one run each; none where no such projection is found.
    """
    layers: dict[str, list[int]] = {}
    for name, (d_in, d_out) in editable_shapes(model).items():
        numbered = re.fullmatch(r"(.+?\.)(\d+)(\..+)", name)
        if numbered and d_out == hidden_size < d_in:
            layers.setdefault(f"{numbered[1]}#{numbered[3]}", []).append(int(numbered[2]))
    if not layers:
        return []
    template, found = max(layers.items(), key=lambda item: len(item[1]))
    count = max(found) + 1
    width = max(1, round(count * SHARE))
    first, last = count // 2, count - width
    starts = sorted({first + (last - first) * place // max(WINDOWS - 1, 1) for place in range(WINDOWS)})
    return [(template.replace("#", _range(start, start + width - 1)),) for start in starts if start <= last]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{{{first}..{last}}}"


def candidates(site_sets: Sequence[tuple[str, ...]], own: Candidate, seed: int) -> list[Candidate]:
    """Everything that could be tried, in the order in which to try it: the configured one, then at random.

    Every run of candidates as long as there are site sets has each of them once, so that none is left out of a short
    search.

    Args:
        site_sets: the configured sites first.
        own: what is configured.
        seed: of the order.
    """
    chance = random.Random(seed)
    queues = []
    for sites in site_sets:
        queue = [Candidate(sites, *values) for values in itertools.product(STEPS, RIDGES, PASSES)]
        chance.shuffle(queue)
        queues.append(queue)
    mixed = [candidate for together in zip(*queues, strict=True) for candidate in together]
    return [own, *(candidate for candidate in mixed if candidate != own)]
