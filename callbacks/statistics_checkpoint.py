"""The LN statistics alone, as a safetensors file that another run can start from."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.run.files.directory import RunDirectory, write_atomically


class StatisticsCheckpoint(Callback):
    """Writes ``statistics.safetensors``, and loads such a file into a new run.

    Names are ``<site or shape>/<keys|value_gradients>/<count|mean|scatter>``; count is int64, the others float32,
    the scatter not divided by the count. The file's metadata says how many turns it covers and of what run.

    Args:
        every_n_turns: write after every so many turns, and always at the end.
        load_from: statistics that a new run starts with; ignored when a run is resumed, which has its own.
    """

    def __init__(self, every_n_turns: int = 10, load_from: str | None = None) -> None:
        """See the class.

        Raises:
            SettingError: if ``every_n_turns`` is not positive.
        """
        if every_n_turns < 1:
            raise SettingError(f"StatisticsCheckpoint.every_n_turns must be at least 1, got {every_n_turns}")
        self.every_n_turns = every_n_turns
        self.load_from = load_from

    def on_fit_start(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """Load, before the first turn of a new run.

        Raises:
            SettingError: if there is no such file.
            IncompatibleCheckpoint: if sites, shapes or dtypes differ; each is named.
        """
        if self.load_from is None or pl_module.state.committed_turns > 0:
            return
        path = Path(self.load_from).expanduser()
        if not path.is_file():
            raise SettingError(f"StatisticsCheckpoint.load_from: there is no file {path}")
        pl_module.state.statistics = pl_module.state.statistics.loaded(load_file(path), str(path))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when due."""
        if trainer.global_step % self.every_n_turns == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """Write the final statistics."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, editor: LifelongEditor) -> None:
        if not trainer.is_global_zero:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in editor.state.statistics.tensors().items()}
        metadata = {
            "turns": str(editor.state.committed_turns),
            "fingerprint": json.dumps(editor.fingerprint(), sort_keys=True),
        }
        write_atomically(RunDirectory(trainer.default_root_dir).statistics, save(tensors, metadata))


def describe_statistics(path: str | Path) -> dict[str, str]:
    """The metadata of a statistics file: ``turns`` it covers and the ``fingerprint`` of its run (JSON)."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
