"""The LN statistics of a whole editor: key and value-gradient moments of every site."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stableedit_pl.errors import IncompatibleCheckpoint
from stableedit_pl.method.moments import Moments

StatisticsScope = Literal["site", "shape"]


class Shaped(Protocol):
    """What a site must tell for its statistics to be laid out."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Rows:
    """What a turn yields at one site.

    Attributes:
        keys: the site's inputs at the turn's N answer tokens, float32 ``[N, d_in]``.
        gradients: the loss's gradients at its outputs, same positions, float32 ``[N, d_out]``.
    """

    keys: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class LNStatistics:
    """Moments of keys (diagonal) and value gradients (full), by *scope key*.

    Attributes:
        scope_of: site name to scope key: the site's own name, or its shape ``"<d_in>x<d_out>"`` when all
            sites of a shape share one set of moments (as the published program does).
        keys: scope key to the keys' moments.
        gradients: scope key to the value gradients' moments.
    """

    scope_of: Mapping[str, str]
    keys: Mapping[str, Moments]
    gradients: Mapping[str, Moments]

    @classmethod
    def empty(
        cls, sites: Iterable[Shaped], scope: StatisticsScope, devices: Mapping[str, torch.device] | None = None
    ) -> "LNStatistics":
        """Statistics of no rows.

        Args:
            sites: the edited sites.
            scope: one set of moments per ``site`` or per ``shape``.
            devices: site name to the device its moments live on; CPU where absent. A shape's moments live where
                its first site's do.
        """
        scope_of: dict[str, str] = {}
        keys: dict[str, Moments] = {}
        gradients: dict[str, Moments] = {}
        for site in sites:
            key = site.name if scope == "site" else f"{site.d_in}x{site.d_out}"
            scope_of[site.name] = key
            device = (devices or {}).get(site.name, torch.device("cpu"))
            keys.setdefault(key, Moments.empty(site.d_in, full=False, device=device))
            gradients.setdefault(key, Moments.empty(site.d_out, full=True, device=device))
        return cls(scope_of, keys, gradients)

    def beside_moments(self, site: str, rows: Rows) -> Rows:
        """A site's rows on the device of its moments."""
        scope = self.scope_of[site]
        return Rows(
            moved(rows.keys, self.keys[scope].mean.device), moved(rows.gradients, self.gradients[scope].mean.device)
        )

    def host_last(self, sites: Iterable[str]) -> list[str]:
        """Sites in the order in which their work is best given out: those whose moments are on the host come last.

        Work on an accelerator is queued and goes on by itself, that on the host holds up whatever comes after it.
        """
        return sorted(sites, key=lambda site: self.keys[self.scope_of[site]].mean.device.type == "cpu")

    def updated(self, captured: Mapping[str, Rows]) -> "LNStatistics":
        """Statistics that also include a turn's rows of every site."""
        keys, gradients = dict(self.keys), dict(self.gradients)
        for name, rows in captured.items():
            scope, placed = self.scope_of[name], self.beside_moments(name, rows)
            keys[scope] = keys[scope].updated(placed.keys)
            gradients[scope] = gradients[scope].updated(placed.gradients)
        return LNStatistics(self.scope_of, keys, gradients)

    def finite(self) -> list[Tensor]:
        """Whether every mean and scatter is finite: boolean scalars, each on its moments' device."""
        return [moments.finite() for moments in (*self.keys.values(), *self.gradients.values())]

    def tensors(self) -> dict[str, Tensor]:
        """All state as tensors, named ``<scope key>/<keys|value_gradients>/<count|mean|scatter>``."""
        return {
            f"{scope}/{kind}/{part}": tensor
            for kind, group in (("keys", self.keys), ("value_gradients", self.gradients))
            for scope, moments in group.items()
            for part, tensor in moments.tensors().items()
        }

    def loaded(self, tensors: Mapping[str, Tensor], source: str) -> "LNStatistics":
        """These statistics' layout with the values of ``tensors`` (as from :meth:`tensors`).

        Args:
            tensors: the state to take.
            source: where it comes from, for error messages.

        Raises:
            IncompatibleCheckpoint: if names, shapes or dtypes are not exactly these statistics'; they are listed.
        """
        own = self.tensors()
        problems = [f"{name}: not in {source}" for name in own if name not in tensors]
        problems += [f"{name}: in {source}, but not a statistic of this run" for name in tensors if name not in own]
        for name in own.keys() & tensors.keys():
            here, there = own[name], tensors[name]
            if here.shape != there.shape or here.dtype != there.dtype:
                problems.append(
                    f"{name}: {list(there.shape)} {there.dtype} in {source}, "
                    f"{list(here.shape)} {here.dtype} in this run"
                )
        if problems:
            raise IncompatibleCheckpoint(
                f"The LN statistics in {source} do not fit this run's sites:\n  "
                + "\n  ".join(sorted(problems))
                + "\nUse the same base model, sites and statistics_scope, or start without them."
            )

        def group(kind: str, like: Mapping[str, Moments]) -> dict[str, Moments]:
            return {
                scope: Moments.from_tensors(
                    {part: tensors[f"{scope}/{kind}/{part}"] for part in ("count", "mean", "scatter")},
                    device=moments.mean.device,
                )
                for scope, moments in like.items()
            }

        return LNStatistics(self.scope_of, group("keys", self.keys), group("value_gradients", self.gradients))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting where that is safe: what comes to the host must have arrived to be read."""
    return tensor.to(device, non_blocking=device.type != "cpu")
