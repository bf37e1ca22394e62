"""Checkpoint files that are whole or absent, and loading that executes no code."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from stableedit_pl.run_directory import flush_directory, flush_to_disk


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final file, waits for the disk, then renames.

    Lightning's own moves a temporary file from elsewhere, which is no rename across file systems: a kill in
    that move leaves a corrupt checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; the file that was there stays until the new one is complete."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            flush_to_disk(file.fileno())
        temporary.replace(target)
        flush_directory(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values only; a file that asks for anything else is refused.

        Args:
            path: the file.
            map_location: as in ``torch.load``; the CPU by default, from where values go to their places.
            weights_only: always treated as True.
        """
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded
