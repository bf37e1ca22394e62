"""A progress bar in turns, with edits per second and live efficacy."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from stableedit_pl.editor import LifelongEditor


class TurnProgress(TQDMProgressBar):
    """Shows turns done, edits per second of editing (scores not counted), and the last turn's efficacy."""

    def __init__(self, refresh_rate: int = 1) -> None:
        """See the class.

        Args:
            refresh_rate: turns between redraws.
        """
        super().__init__(refresh_rate=refresh_rate)
        self._edits = 0
        self._edit_seconds = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """A bar in turns, on standard error like all that is no result."""
        return Tqdm(
            desc="Turn",
            unit="turn",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the committed turn; Lightning sets its length only where a run begins."""
        super().on_train_start(trainer, pl_module)
        turns, horizon = len(trainer.datamodule.schedule), trainer.max_steps  # type: ignore[attr-defined]
        self.train_progress_bar.reset(total=turns if horizon < 0 else min(turns, horizon))
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()
        self._edits, self._edit_seconds = 0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Nothing: a stream has no epochs."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the turn's edits and redraw."""
        if isinstance(pl_module, LifelongEditor) and pl_module.report is not None:
            self._edits += len(batch.edits)
            self._edit_seconds += pl_module.report.edit_seconds
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if self._edits:
            shown["edits/s"] = f"{self._edits / max(self._edit_seconds, 1e-9):.0f}"
        if isinstance(pl_module, LifelongEditor) and pl_module.report is not None:
            report = pl_module.report
            if report.turn.phase == "warmup":
                shown["phase"] = "warmup"
            if pl_module.state.rejected_turns:
                shown["rejected"] = len(pl_module.state.rejected_turns)
            if report.at_edit_efficacy is not None:
                shown["efficacy"] = f"{report.at_edit_efficacy:.2f}"
        return shown
