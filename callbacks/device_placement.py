"""Where the model is, and where the editor's statistics and algebra are."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from stableedit_pl.data.stream import EditStream
from stableedit_pl.devices import ranks
from stableedit_pl.devices.device_maps import (
    AUTOMATIC,
    Demand,
    Plan,
    key_of,
    model_bytes,
    plan_automatic,
    plan_explicit,
)
from stableedit_pl.devices.placement import HOST, Needs, Wanted, cost_in_host, listed, size, table
from stableedit_pl.devices.rank_devices import accelerators, as_device, foreign_devices, free_bytes, rank_devices
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.model.loading import load_skeleton
from stableedit_pl.model.sites import resolve_sites

log = logging.getLogger(__name__)

TURN_ROWS = 300
"""Answer tokens of a turn where no stream says: 100 edits of three."""


class DevicePlacement(Callback):
    """Puts the model over several devices, and the editor's state beside it or elsewhere; refuses what has no room.

    All is planned from shapes, the formula of docs/memory.md and free memory, before anything is loaded. Of several
    processes on a machine each has the devices from its first up to the next one's: ``trainer.devices: [0, 4]``.

    Args:
        editor_device: where moments, float32 masters and a turn's algebra live: null, beside each site; ``spread``, one
            site after another on all accelerators of the process, so that they are solved at the same time; a list,
            on these alike; or one device, ``cuda:1`` or ``cpu``. What finds no room goes to another device and, with a
            warning that says what it costs, to host memory; but one named device is refused instead.
        device_map: how accelerate spreads the model: ``auto``, ``balanced``, ``sequential`` (each leaves room for the
            editor), one device, or a mapping from module names to devices; null leaves the model whole where the
            trainer puts it. Needs the package accelerate.
        turn_rows: answer tokens of a turn to reckon with; null takes the largest of some turns of the stream.
        headroom: fraction of each device's free memory that is left to activations and libraries.
    """

    def __init__(
        self,
        editor_device: str | list[str] | None = None,
        device_map: str | dict[str, str | int] | None = None,
        turn_rows: int | None = None,
        headroom: float = 0.1,
    ) -> None:
        """See the class.

        Raises:
            SettingError: if a number is out of range.
        """
        if turn_rows is not None and turn_rows < 1:
            raise SettingError(f"DevicePlacement.turn_rows must be at least 1 or null, got {turn_rows}")
        if not 0 <= headroom < 1:
            raise SettingError(f"DevicePlacement.headroom must be at least 0 and less than 1, got {headroom}")
        self.editor_device = editor_device
        self.device_map = device_map
        self.turn_rows = turn_rows
        self.headroom = headroom

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan, and hand the plan to the editor, before the model is loaded.

        Raises:
            MisconfigurationException: if a device does not exist or is another process's, or accelerate is needed and
                missing, or the strategy divides the model.
            PlacementError: if there is not enough memory.
        """
        if not isinstance(pl_module, LifelongEditor):
            raise MisconfigurationException("DevicePlacement needs a LifelongEditor")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "DevicePlacement places a model that one process holds whole; under strategy sharded the processes "
                "hold it in parts, and the editor's state lives beside each part: leave out DevicePlacement, or use ddp"
            )
        root = as_device(trainer.strategy.root_device)
        wanted, chosen = self._editor_devices(root)
        device_map = self._model_devices(root)
        explicit = device_map if isinstance(device_map, dict) else {"": root}
        _refuse_foreign(trainer, [*chosen, *explicit.values()])
        if device_map is not None and importlib.util.find_spec("accelerate") is None:
            raise MisconfigurationException(
                "DevicePlacement.device_map spreads the model through accelerate, which is not installed: "
                "pip install 'stableedit_pl[devices]'"
            )
        own = rank_devices(trainer)
        devices = list(dict.fromkeys([*own, *chosen, *explicit.values(), HOST]))
        sharing = len(getattr(trainer.strategy, "parallel_devices", None) or [root])
        free = dict(zip(devices, free_bytes(devices, sharing), strict=True))
        needs = self._needs(trainer, pl_module) if stage == "fit" else None
        if pl_module.sites:  # loaded for an earlier fit or validate: it stays where it is, and its memory is not free
            skeleton, sites = pl_module.model, pl_module.sites
            placed = getattr(skeleton, "hf_device_map", pl_module.device_map)
            if placed is None and device_map is not None:
                raise MisconfigurationException(
                    "DevicePlacement.device_map came too late: the model is loaded. Make a new LifelongEditor"
                )
            if isinstance(placed, Mapping):
                device_map = explicit = {name: as_device(device) for name, device in placed.items()}
                for device, count in model_bytes(skeleton, explicit).items():
                    free[device] = free.get(device, float("inf")) + count
        else:
            skeleton = load_skeleton(pl_module.base_model, pl_module.model_dtype)
            if device_map is None and trainer.precision in ("bf16-true", "16-true"):
                skeleton = skeleton.bfloat16()  # Lightning rounds a model that it places itself
            sites = resolve_sites(skeleton, pl_module.site_patterns)
        demand = Demand(skeleton, sites, needs, wanted, chosen or own)
        if isinstance(device_map, str):
            usable = {device: count for device, count in free.items() if device in (*own, HOST)}
            plan = plan_automatic(demand, device_map, usable, self.headroom)
        else:
            plan = plan_explicit(demand, explicit, free, self.headroom)
        if device_map is not None:
            pl_module.device_map = {module: key_of(device) for module, device in plan.device_map.items()}
        if plan.placement is not None:
            pl_module.state_devices = plan.placement.device_of
        if trainer.is_global_zero:
            _report(plan, needs)

    def _needs(self, trainer: Any, editor: LifelongEditor) -> Needs:
        stream = trainer.datamodule
        rows = self.turn_rows or (stream.turn_rows() if isinstance(stream, EditStream) else 0) or TURN_ROWS
        return Needs(rows, editor.master_dtype == "float32", editor.statistics_scope, editor.settings)

    def _editor_devices(self, root: torch.device) -> tuple[Wanted, list[torch.device]]:
        """Where state should be, and the devices that the setting names."""
        if self.editor_device in (None, "site"):
            return "site", []
        if self.editor_device == "spread":
            return "spread", []
        if isinstance(self.editor_device, list):
            return "spread", [_named("DevicePlacement.editor_device", name, root) for name in self.editor_device]
        device = _named("DevicePlacement.editor_device", self.editor_device, root)
        return device, [device]

    def _model_devices(self, root: torch.device) -> str | dict[str, torch.device] | None:
        """The device map with its devices checked."""
        if self.device_map is None or (isinstance(self.device_map, str) and self.device_map in AUTOMATIC):
            return self.device_map
        given = self.device_map if isinstance(self.device_map, dict) else {"": self.device_map}
        setting = "DevicePlacement.device_map"
        return {
            module: _named(f"{setting}[{module!r}]" if given is self.device_map else setting, device, root)
            for module, device in given.items()
        }


def _named(setting: str, name: Any, root: torch.device) -> torch.device:
    """The device that a setting names; an accelerator without a number is the process's first."""
    return root if name == root.type else existing_device(setting, name)


def _refuse_foreign(trainer: Any, named: Sequence[torch.device]) -> None:
    """Refuse on every rank what is another's on any, so that none goes on and waits."""
    for place, foreign in enumerate(ranks.gather(foreign_devices(trainer, named))):
        if foreign:
            raise MisconfigurationException(
                f"DevicePlacement names {', '.join(foreign)}, which process {place} of {trainer.world_size} does not "
                "have to itself: a process's own devices are those from its first, in trainer.devices, up to the next "
                "process's. editor_device null or spread and device_map auto, balanced or sequential take its own."
            )


def _report(plan: Plan, needs: Needs | None) -> None:
    """Say what goes where, and what is in host memory for want of room."""
    placement = plan.placement
    log.info("Placement:\n%s", table(plan.rooms, {} if placement is None else placement.planned))
    if plan.offloaded:
        log.warning(
            "The accelerators have no room for all of the model: %s of it wait in host memory and cross the bus in "
            "every forward pass, several times a turn. More devices or a coarser model_dtype would end that.",
            size(plan.offloaded),
        )
    if placement is None or needs is None:
        return
    elsewhere = [site.name for site in placement.moved if site not in placement.in_host]
    if elsewhere:
        where = dict.fromkeys(str(placement.device_of[name]) for name in elsewhere)
        log.warning(
            "No room for the editor's state of %s where it was wanted; it is on %s.",
            listed(elsewhere),
            ", ".join(where),
        )
    for site_state, level, why in (
        (
            [site for site in placement.in_host if site in placement.moved],
            logging.WARNING,
            "No accelerator has room for",
        ),
        ([site for site in placement.in_host if site not in placement.moved], logging.INFO, "Not beside the model:"),
    ):
        if site_state:
            names = listed([site.name for site in site_state])
            cost = cost_in_host(site_state, needs)
            log.log(
                level, "%s the editor's state of %s. It lives in host memory: %s (docs/placement.md).", why, names, cost
            )


def existing_device(setting: str, name: Any) -> torch.device:
    """The device called ``name``, if this machine has it.

    Args:
        setting: where the name comes from, for the message.
        name: as in ``cpu``, ``cuda:1``, or an accelerator's index.

    Raises:
        MisconfigurationException: if there is none; the message lists those there are.
    """
    available = [HOST, *accelerators()]
    try:
        wanted = as_device(name)
    except RuntimeError:
        wanted = None
    if wanted not in available:
        raise MisconfigurationException(
            f"{setting}={name}: no such device here; there is {', '.join(map(str, available))}"
        )
    return wanted
