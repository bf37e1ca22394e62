"""Which devices are a rank's own, and how much memory they have.

Several ranks on one machine start at different devices, ``trainer.devices: [0, 4]``; a rank's own are those from its
first up to the next rank's, so that each can spread a replica of the model. The host belongs to all.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from stableedit_pl.devices import ranks

HOST = torch.device("cpu")


def accelerators() -> list[torch.device]:
    """All accelerators of this machine."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*found, torch.device("mps")] if torch.backends.mps.is_available() else found


def as_device(name: Any) -> torch.device:
    """A device as torch reports it: an index is an accelerator's, the host has none.

    Raises:
        RuntimeError: if torch knows no such device.
    """
    device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    if device.type == "cuda":
        return torch.device("cuda", device.index or 0)
    return torch.device(device.type)


def own_devices(
    starts: Sequence[torch.device], place: int, existing: Sequence[torch.device], width: int | None = None
) -> list[torch.device]:
    """The accelerators of one of the ranks on this machine.

    Args:
        starts: the first device of each rank on this machine.
        place: which of them is asked about.
        existing: all accelerators of this machine.
        width: most devices of a rank; None: as many as the narrowest of them has, so that replicas are alike.

    Returns:
        From its first device up to the next rank's, in order; empty for a rank on the CPU.
    """
    own = as_device(starts[place])
    if own.type == "cpu":
        return []
    alike = [device for device in existing if device.type == own.type]
    first = sorted({alike.index(as_device(start)) for start in starts})
    ends = [*first[1:], len(alike)]
    narrowest = min(end - start for start, end in zip(first, ends, strict=True))
    begin = alike.index(own)
    return alike[begin : begin + min(narrowest, width or narrowest)]


def rank_devices(trainer: Any) -> list[torch.device]:
    """The accelerators of this rank; the same number on every rank of the run.

    Args:
        trainer: whose ranks have met.
    """
    strategy = trainer.strategy
    starts = getattr(strategy, "parallel_devices", None) or [strategy.root_device]
    place = trainer.local_rank if len(starts) > 1 else 0
    width = min(ranks.gather(len(own_devices(starts, place, accelerators()))))
    return own_devices(starts, place, accelerators(), width) if width else []


def foreign_devices(trainer: Any, named: Iterable[Any]) -> list[str]:
    """Those of the named devices that other ranks may use; none in a run of one process."""
    if trainer.world_size == 1:
        return []
    own = [HOST, *rank_devices(trainer)]
    return sorted({str(as_device(name)) for name in named if as_device(name) not in own})


def free_bytes(devices: Sequence[torch.device], sharing: int) -> list[float]:
    """Free memory of devices in bytes, on whichever rank it is least; infinite where it is not known.

    Args:
        devices: of this rank; those of other ranks at the same places are alike.
        sharing: ranks that share this machine's host memory.
    """
    own = [host_memory() / sharing if device == HOST else _free(device) for device in devices]
    return [min(everywhere) for everywhere in zip(*ranks.gather(own), strict=True)]


def host_memory() -> float:
    """Bytes that this machine can give without swapping; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _free(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    # What torch has reserved and does not use is as good as free.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)
