"""A progress bar in turns, with edits per second and live efficacy."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from stableedit_pl.editor import LifelongEditor


class TurnProgress(TQDMProgressBar):
    """Shows turns done, edits per second since this process started editing, and the last turn's efficacy."""

    def __init__(self, refresh_rate: int = 1) -> None:
        """See the class.

        Args:
            refresh_rate: turns between redraws.
        """
        super().__init__(refresh_rate=refresh_rate)
        self._edits = 0
        self._started = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """A bar named for what it counts."""
        bar = super().init_train_tqdm()
        bar.set_description("Turn")
        bar.unit = "turn"
        return bar

    @property
    def total_train_batches(self) -> int | float:
        """Turns of the stream, or of the horizon if that is shorter."""
        total, horizon = super().total_train_batches, self.trainer.max_steps
        return total if horizon < 0 else min(total, horizon)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the committed turn."""
        super().on_train_start(trainer, pl_module)
        self._edits, self._started = 0, time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the bar again; Lightning calls it after the epoch, and a stream has none."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("Turn")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the turn's edits and redraw."""
        self._edits += len(batch.edits)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        elapsed = time.perf_counter() - self._started
        if self._edits:
            shown["edits/s"] = f"{self._edits / max(elapsed, 1e-9):.1f}"
        if isinstance(pl_module, LifelongEditor) and pl_module.report is not None:
            report = pl_module.report
            if report.turn.phase == "warmup":
                shown["phase"] = "warmup"
            if pl_module.state.rejected_turns:
                shown["rejected"] = len(pl_module.state.rejected_turns)
            if report.at_edit_efficacy is not None:
                shown["efficacy"] = f"{report.at_edit_efficacy:.2f}"
        return shown
