"""Where the editor's state of each site lives, planned from shapes and free bytes before anything is loaded.

A site's *state* is what the editor keeps and makes of it: moments, float32 master, a turn's rows, factorizations and
updates; its bytes are those of :func:`stableedit_pl.devices.memory.planned_bytes`. Devices are names here: nothing is
allocated and no device is asked, so that a plan can be made for machines that are elsewhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from stableedit_pl.devices.memory import F32, F64, planned_bytes
from stableedit_pl.errors import SettingError
from stableedit_pl.method.inverse_root import quadrature_nodes, root_operations
from stableedit_pl.method.normalization import choose_solver
from stableedit_pl.method.ridge import ridge_operations
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import StatisticsScope

HOST = torch.device("cpu")

Wanted = Literal["site", "spread"] | torch.device
"""Beside each site, in turn on several devices, or all on one."""


class PlacementError(SettingError):
    """A placement for which there is not enough memory, or which cannot work; the message says what to change."""


@dataclass(frozen=True)
class ModelSite:
    """A site as the plan sees it.

    Attributes:
        name: its full name in the base model.
        d_in: width of its keys.
        d_out: width of its value gradients.
        itemsize: bytes of one number of its weight.
        device: where the model has it.
    """

    name: str
    d_in: int
    d_out: int
    itemsize: int
    device: torch.device


@dataclass(frozen=True)
class Needs:
    """What decides how much state a site has.

    Attributes:
        rows: answer tokens of a turn.
        masters: whether sites coarser than float32 get masters.
        scope: the editor's ``statistics_scope``.
        settings: the method; it decides who takes the inverse root.
    """

    rows: int
    masters: bool
    scope: StatisticsScope
    settings: MethodSettings

    def bytes(self, sites: Sequence[ModelSite], device: torch.device) -> int:
        """Peak bytes of a turn of these sites, their state being on one device."""
        if not sites:
            return 0
        shapes = [(site.d_in, site.d_out) for site in sites]
        solvers = {self._solver(site, device) for site in sites}
        masters = any(self.master(site) for site in sites)
        passes = self.settings.passes
        return max(planned_bytes(shapes, self.rows, masters, self.scope, solver, passes).total for solver in solvers)

    def master(self, site: ModelSite) -> bool:
        """Whether a site has a float32 master."""
        return self.masters and site.itemsize < F32

    def groups(self, sites: Sequence[ModelSite]) -> list[list[ModelSite]]:
        """Sites that must stay together: those that share moments."""
        if self.scope == "site":
            return [[site] for site in sites]
        shapes: dict[tuple[int, int], list[ModelSite]] = {}
        for site in sites:
            shapes.setdefault((site.d_in, site.d_out), []).append(site)
        return list(shapes.values())

    def _solver(self, site: ModelSite, device: torch.device) -> Literal["eigh", "quadrature"] | None:
        method = self.settings
        if method.normalization != "whiten":
            return None
        wanted = method.solver_on(device)
        chosen = choose_solver(wanted, self.rows, site.d_out, device, method.prior_strength, method.eigenvalue_floor)
        return "eigh" if chosen == "eigh" else "quadrature"

    def traffic(self, site: ModelSite, device: torch.device) -> tuple[int, int, float]:
        """What a turn costs whose state of this site is away from its weight, on ``device``.

        Returns:
            Bytes of keys and value gradients that go there; bytes of the rounded weight, or of the update's factors
            where there is no master, that come back; operations of the algebra there, a multiply-add counted as two.
        """
        rows, d_in, d_out = self.rows, site.d_in, site.d_out
        rank = min(rows, d_in)
        there = F32 * rows * (d_in + d_out)
        back = site.itemsize * d_in * d_out if self.master(site) else F32 * rank * d_in + F64 * rank * d_out
        # Moments, ridge, and the update added to the master.
        flop = 2.0 * rows * d_out**2 + ridge_operations(rows, d_in, d_out) + 2 * rank * d_in * d_out
        solver = self._solver(site, device)
        if solver == "eigh":
            flop += root_operations(rows, d_out, None)
        elif solver == "quadrature":  # nodes grow with the logarithm of the rows seen: those of the thousandth turn
            nodes = len(quadrature_nodes(1 + 1000 * rows / self.settings.prior_strength))
            flop += root_operations(rows, d_out, nodes)
        # Each pass sends its rows, is solved, and is tried on.
        passes = self.settings.passes
        return there * passes, back * passes, flop * passes


@dataclass(frozen=True)
class Room:
    """Memory of one device, in bytes.

    Attributes:
        free: before anything is loaded; infinite where nobody can say.
        model: what the language model takes of it.
        kept: what stays free for activations, the turn's rows on their way, and libraries.
    """

    free: float
    model: int = 0
    kept: int = 0

    @property
    def left(self) -> float:
        """For the editor."""
        return self.free - self.model - self.kept


@dataclass(frozen=True)
class Placement:
    """Where each site's state lives.

    Attributes:
        device_of: site name to device.
        wanted: device to the bytes of state that would be there with room enough.
        planned: device to the bytes of state that are there.
        moved: sites whose state found no room where it was wanted.
        in_host: sites whose weight is on an accelerator and whose state is in host memory.
    """

    device_of: Mapping[str, torch.device]
    wanted: Mapping[torch.device, int]
    planned: Mapping[torch.device, int]
    moved: Sequence[ModelSite] = field(default_factory=list)
    in_host: Sequence[ModelSite] = field(default_factory=list)


def place_state(
    sites: Sequence[ModelSite],
    needs: Needs,
    rooms: Mapping[torch.device, Room],
    wanted: Wanted,
    over: Sequence[torch.device] = (),
) -> Placement:
    """Find a place for every site's state.

    Beside the sites and spread, what finds no room goes to the next device of ``over`` (beside the sites: the one with
    most room left), and to host memory last.

    Args:
        sites: in the model's order.
        needs: of a turn.
        rooms: every device that may be used, and the host.
        wanted: where the state should be.
        over: accelerators that state may be on; none means the host.

    Raises:
        PlacementError: if there is no room, with a table of what is needed and what there is.
    """
    over = tuple(over) or (HOST,)
    members: dict[torch.device, list[ModelSite]] = {}
    ideal: dict[torch.device, list[ModelSite]] = {}
    moved: list[ModelSite] = []
    stuck = False
    for place, group in enumerate(needs.groups(sites)):
        if isinstance(wanted, torch.device):
            choices = [wanted]
        elif wanted == "spread":
            start = place % len(over)
            choices = [*over[start:], *over[:start], HOST]
        else:
            emptiest = sorted(over, key=lambda one: needs.bytes(members.get(one, []), one) - rooms[one].left)
            choices = [group[0].device, *emptiest, HOST]
        ideal.setdefault(choices[0], []).extend(group)
        fitting = (one for one in choices if needs.bytes([*members.get(one, []), *group], one) <= rooms[one].left)
        chosen = next(fitting, None)
        stuck |= chosen is None
        if chosen != choices[0]:
            moved += group
        if chosen is not None:
            members.setdefault(chosen, []).extend(group)
    planned = {one: needs.bytes(held, one) for one, held in members.items()}
    asked = {one: needs.bytes(held, one) for one, held in ideal.items()}
    if stuck:
        raise PlacementError(
            f"There is no room for the editor's state of {len(sites)} sites ({needs.rows} answer tokens a turn; the "
            f"formula is in docs/memory.md):\n{table(rooms, asked)}\n"
            "Nothing was loaded. Change one of: DevicePlacement.editor_device (another device; spread; null, which "
            "also tries the others and host memory), DevicePlacement.device_map (to leave room beside the model), a "
            "smaller data.turn_size, fewer model.sites, a smaller DevicePlacement.headroom."
        )
    device_of = {site.name: one for one, held in members.items() for site in held}
    in_host = [site for site in sites if device_of[site.name] == HOST and site.device != HOST]
    return Placement({site.name: device_of[site.name] for site in sites}, asked, planned, moved, in_host)


def cost_in_host(sites: Sequence[ModelSite], needs: Needs) -> str:
    """What it costs that these sites' state is in host memory, for a warning."""
    costs = [needs.traffic(site, HOST) for site in sites]
    there, back, flop = (sum(part) for part in zip(*costs, strict=True))
    what = "weights" if any(needs.master(site) for site in sites) else "update factors"
    return (
        f"every turn {size(there)} of keys and value gradients go to the host and {size(back)} of {what} come back "
        f"over the bus, and the CPU does {flop / 1e12:.2g} TFLOP of algebra"
    )


def listed(names: Sequence[str]) -> str:
    """Names for people: all of a few, the first three of many."""
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def size(count: float) -> str:
    """Bytes for people."""
    if math.isinf(count):
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def table(rooms: Mapping[torch.device, Room], editor: Mapping[torch.device, int]) -> str:
    """What each device has and is asked for; a line per device that is asked for anything or may be used."""
    rows: list[tuple[str, ...]] = [("device", "free", "model", "kept free", "editor", "missing")]
    for device, room in rooms.items():
        asked = editor.get(device, 0)
        missing = size(asked - room.left) if asked + room.model and asked > room.left else "-"
        rows.append((str(device), *(size(number) for number in (room.free, room.model, room.kept, asked)), missing))
    return "\n".join(_aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        yield "  " + "  ".join(cells)
