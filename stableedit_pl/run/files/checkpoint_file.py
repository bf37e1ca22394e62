"""Reading a checkpoint: loading that executes no code, and needs no Lightning."""

import pickle
from pathlib import Path
from typing import Any

import torch

from stableedit_pl.run.files.integrity import damage


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load tensors and plain values from a file; nothing in it is ever executed.

    Args:
        path: the file.
        map_location: as in ``torch.load``.

    Raises:
        CheckpointError: if the file is damaged, or asks for anything but tensors and plain values.
    """
    problem = damage(Path(path))
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}")
    try:
        loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, so it was not written by stableedit_pl. It is refused, "
            f"and nothing in it was executed. ({_what_it_asks_for(error)})"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    return loaded


def _what_it_asks_for(error: Exception) -> str:
    """The line of PyTorch's long message that names what a file wanted to call."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
    return lines[0].split(" was not")[0] if lines else str(error).splitlines()[0]
