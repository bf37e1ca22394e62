"""A model's parts on devices, and the editor's state beside them: planned together, on a model without weights.

accelerate decides which layer goes where; what it is told is how much memory the editor leaves. Its maps name
accelerators by index; here they are ``torch.device``.
"""

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stableedit_pl.devices.placement import (
    HOST,
    ModelSite,
    Needs,
    Placement,
    PlacementError,
    Room,
    Wanted,
    listed,
    place_state,
    size,
    table,
)
from stableedit_pl.devices.rank_devices import as_device

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")

DeviceMap = Mapping[str, torch.device]
"""Module names to devices; the empty name is the whole model."""


class EditedWeight(Protocol):
    """What a plan must know of a site."""

    name: str
    d_in: int
    d_out: int

    @property
    def weight(self) -> torch.Tensor:
        """The weight, on the ``meta`` device."""


@dataclass(frozen=True)
class Demand:
    """What is to be placed.

    Attributes:
        skeleton: the language model on the ``meta`` device.
        sites: its sites.
        needs: of a turn; None where nothing is edited.
        wanted: where the editor's state should be.
        over: devices that state may be on.
    """

    skeleton: Any
    sites: Sequence[EditedWeight]
    needs: Needs | None
    wanted: Wanted
    over: Sequence[torch.device]


@dataclass(frozen=True)
class Plan:
    """Where everything goes.

    Attributes:
        device_map: of the model.
        rooms: memory of each device.
        placement: of the editor's state; None where nothing is edited.
        offloaded: bytes of the model that wait in host memory and are run on an accelerator.
    """

    device_map: DeviceMap
    rooms: Mapping[torch.device, Room]
    placement: Placement | None
    offloaded: int = 0


def device_of(name: str, device_map: DeviceMap) -> torch.device:
    """Where a map puts a module or parameter: what it says of the nearest module around it.

    Raises:
        PlacementError: if it says nothing.
    """
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        around = ".".join(parts[:length])
        if around in device_map:
            return device_map[around]
    raise PlacementError(f"DevicePlacement.device_map says nothing of {name}; add it, or a default under the name ''")


def model_bytes(skeleton: Any, device_map: DeviceMap) -> dict[torch.device, int]:
    """Bytes of the model's parameters and buffers on each device; tied ones count where they come first."""
    total: dict[torch.device, int] = {}
    for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()]:
        device = device_of(name, device_map)
        total[device] = total.get(device, 0) + tensor.numel() * tensor.element_size()
    return total


def inferred(skeleton: Any, kind: str, memory: Mapping[torch.device, float]) -> dict[str, torch.device]:
    """The map that accelerate finds for a model.

    Args:
        skeleton: the model on ``meta``, its weights tied.
        kind: one of ``AUTOMATIC``.
        memory: bytes that the model may take of each device.

    Returns:
        Parts that nothing has room for are on ``meta``.

    Raises:
        PlacementError: if the first device is to be spared and is another process's.
    """
    if kind == "balanced_low_0" and len(memory) > 1 and torch.device("cuda", 0) not in memory:
        raise PlacementError(
            "DevicePlacement.device_map=balanced_low_0 spares cuda:0, which is not among this process's devices; use "
            "balanced"
        )
    accelerate = importlib.import_module("accelerate")
    whole: Any = getattr(skeleton, "_no_split_modules", None)
    options = {"no_split_module_classes": None if whole is None else list(whole)}
    limits: Any = {key_of(device): int(min(count, 2**62)) for device, count in memory.items() if count > 0}
    if kind != "sequential":
        low_zero = kind == "balanced_low_0"
        limits = accelerate.utils.get_balanced_memory(skeleton, limits, low_zero=low_zero, **options)
    found = accelerate.infer_auto_device_map(skeleton, limits, **options)
    return {name: torch.device("meta") if key == "disk" else as_device(key) for name, key in found.items()}


def key_of(device: torch.device) -> int | str:
    """A device as accelerate names it."""
    return device.index if device.type == "cuda" else str(device)


def _model_sites(sites: Sequence[EditedWeight], device_map: DeviceMap) -> list[ModelSite]:
    return [
        ModelSite(site.name, site.d_in, site.d_out, site.weight.element_size(), device_of(site.name, device_map))
        for site in sites
    ]


def plan_explicit(demand: Demand, device_map: DeviceMap, free: Mapping[torch.device, float], headroom: float) -> Plan:
    """Hold a given map, and the editor beside it, against the memory there is.

    Args:
        demand: what is to be placed.
        device_map: covers the whole model.
        free: bytes of every device that may be used, and of the host.
        headroom: fraction of ``free`` that stays free.

    Raises:
        PlacementError: if model or state have no room, a site would be offloaded, or the map has a gap.
    """
    taken = model_bytes(demand.skeleton, device_map)
    rooms = {
        device: Room(count, taken.get(device, 0), 0 if count == float("inf") else int(headroom * count))
        for device, count in free.items()
    }
    if any(device.type == "meta" for device in taken) or any(rooms[device].left < 0 for device in taken):
        raise PlacementError(
            f"The language model has no room where it is to go:\n{table(rooms, {})}\n"
            f"It takes {size(sum(taken.values()))}. Nothing was loaded. Use device_map: auto over more devices, a "
            "coarser model.model_dtype, or a smaller DevicePlacement.headroom."
        )
    # With an accelerator in the map, accelerate runs the host's parts there, and their weights are there no longer.
    offloads = any(device != HOST for device in taken) and HOST in taken
    placed = _model_sites(demand.sites, device_map)
    lost = [site.name for site in placed if offloads and site.device == HOST]
    if lost:
        raise PlacementError(
            f"DevicePlacement.device_map leaves {listed(lost)} in host memory while other parts are on an "
            "accelerator: accelerate brings such weights there for each pass and drops them, so that no edit would "
            f"last:\n{table(rooms, {})}\nNothing was loaded. Give a device_map that puts the sites' layers on an "
            "accelerator and others on cpu, or more devices."
        )
    placement = None
    if demand.needs is not None:
        placement = place_state(placed, demand.needs, rooms, demand.wanted, demand.over)
    return Plan(device_map, rooms, placement, taken[HOST] if offloads else 0)


def plan_automatic(demand: Demand, kind: str, free: Mapping[torch.device, float], headroom: float) -> Plan:
    """Have accelerate spread the model over what the editor leaves of each device.

    What the editor needs where depends on where the sites are, and that on how much it leaves: maps are asked for until
    one holds both. Room for the whole model on accelerators goes before room for the editor there.

    Args:
        demand: what is to be placed.
        kind: one of ``AUTOMATIC``.
        free: bytes of every device of this rank, and of the host.
        headroom: fraction of ``free`` that stays free.

    Raises:
        PlacementError: as :func:`plan_explicit`.
    """

    def attempt(reserved: Mapping[torch.device, int]) -> tuple[Plan, bool]:
        """A plan, and whether the model is partly in host memory although there are accelerators."""
        memory = {device: (1 - headroom) * count - reserved.get(device, 0) for device, count in free.items()}
        device_map = inferred(demand.skeleton, kind, memory)
        crowded = len(free) > 1 and any(device.type in ("cpu", "meta") for device in device_map.values())
        return plan_explicit(demand, device_map, free, headroom), crowded

    if isinstance(demand.wanted, torch.device) and demand.needs is not None:
        with contextlib.suppress(PlacementError):  # what stands in the way is said below, where nothing is reserved
            plan, crowded = attempt({demand.wanted: demand.needs.bytes(_model_sites(demand.sites, {"": HOST}), HOST)})
            if not crowded:
                return plan
    first, _ = attempt({})
    plan, crowded, reserved = first, False, dict[torch.device, int]()
    for _ in range(1 + len(free)):
        if plan.placement is None or not plan.placement.moved:
            return plan
        for device, count in plan.placement.wanted.items():
            reserved[device] = max(count, reserved.get(device, 0))
        try:
            plan, crowded = attempt(reserved)
        except PlacementError:
            break
        if crowded:
            break
    return first
