"""Checkpoint files that are whole or absent; loading them executes no code."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from stableedit_pl.run.files.checkpoint_file import CheckpointError, read_checkpoint
from stableedit_pl.run.files.directory import flush_directory, flush_to_disk
from stableedit_pl.run.files.integrity import seal

__all__ = ["AtomicCheckpointIO", "CheckpointError", "read_checkpoint", "tensor_bytes"]


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
        try:
            with temporary.open("w+b") as file:
                torch.save(checkpoint, file)
                seal(file)
                file.flush()
                flush_to_disk(file.fileno())
        except (OSError, RuntimeError) as error:
            # A full disk; torch reports it as a RuntimeError when its own writer meets it.
            temporary.unlink(missing_ok=True)
            needed, free = tensor_bytes(checkpoint), shutil.disk_usage(target.parent).free
            raise CheckpointError(
                f"cannot write {target}: {error}. It needs about {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
                "free there. The checkpoint before it is untouched: make room, then resume with --ckpt_path last."
            ) from error
        temporary.replace(target)
        flush_directory(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values only; a file that asks for anything else is refused.

        Args:
            path: the file.
            map_location: as in ``torch.load``; the CPU by default, from where values go to their places.
            weights_only: always treated as True.
        """
        return read_checkpoint(path, map_location or "cpu")


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested checkpoint."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    return sum(tensor_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
