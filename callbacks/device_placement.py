"""Where the model is, and where the editor's statistics and algebra are."""

import importlib.util
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from stableedit_pl.editor import LifelongEditor


class DevicePlacement(Callback):
    """Puts the editor on another device than the model, and a model over several devices.

    Args:
        editor_device: where moments, master weights and the turn's algebra live, as in ``cuda:1`` or ``cpu``; null
            keeps them beside each site.
        device_map: how transformers spreads the model: ``auto``, ``balanced``, ``sequential``, one device, or a
            mapping from module names to devices; null leaves the model whole where the trainer puts it. Needs the
            package accelerate.
    """

    def __init__(self, editor_device: str | None = None, device_map: str | dict[str, str | int] | None = None) -> None:
        """See the class."""
        self.editor_device = editor_device
        self.device_map = device_map

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the devices and hand them to the editor, before the model is loaded.

        Raises:
            MisconfigurationException: if a device does not exist, or accelerate is needed and missing.
        """
        if not isinstance(pl_module, LifelongEditor):
            raise MisconfigurationException("DevicePlacement needs a LifelongEditor")
        if self.editor_device is not None:
            pl_module.editor_device = existing_device("DevicePlacement.editor_device", self.editor_device)
        if self.device_map is not None:
            if isinstance(self.device_map, dict):
                for module, device in self.device_map.items():
                    existing_device(f"DevicePlacement.device_map[{module!r}]", device)
            elif self.device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
                existing_device("DevicePlacement.device_map", self.device_map)
            if importlib.util.find_spec("accelerate") is None:
                raise MisconfigurationException(
                    "DevicePlacement.device_map spreads the model through accelerate, which is not installed: "
                    "pip install 'stableedit_pl[devices]'"
                )
            pl_module.device_map = self.device_map


def existing_device(setting: str, name: Any) -> torch.device:
    """The device called ``name``, if this machine has it.

    Args:
        setting: where the name comes from, for the message.
        name: as in ``cpu``, ``cuda:1``, or an accelerator's index.

    Raises:
        MisconfigurationException: if there is none; the message lists those there are.
    """
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    wanted = f"cuda:{name}" if isinstance(name, int) else name
    wanted = {"cuda": "cuda:0", "cpu:0": "cpu"}.get(wanted, wanted)
    if wanted not in available:
        raise MisconfigurationException(f"{setting}={name}: no such device here; there is {', '.join(available)}")
    return torch.device(wanted)
