"""Leaves the run resumable: saves completed turns, on a schedule, at the end, and when asked to stop."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from stableedit_pl.devices import ranks
from stableedit_pl.errors import SettingError
from stableedit_pl.run import slurm
from stableedit_pl.run.files.directory import RunDirectory, flush_directory
from stableedit_pl.run.freed_memory import hand_back
from stableedit_pl.run.stop_signals import StopRequested, StopSignals

log = logging.getLogger(__name__)


class TurnCheckpoint(Checkpoint):
    """Writes ``checkpoints/turn=<n>.ckpt`` and points ``checkpoints/last.ckpt`` at the newest.

    A new run's position 0 is saved before its first turn. The first Ctrl-C or SIGTERM lets the turn finish, saves, and
    stops; a second Ctrl-C stops at once. So does SIGUSR1 in a SLURM job, which is then requeued.

    Args:
        every_n_turns: save after every so many turns; None for never by count.
        every_n_minutes: save when so many minutes have passed since the last time; None for never by time.
        keep: how many ``turn=*.ckpt`` files stay.
    """

    def __init__(self, every_n_turns: int | None = 10, every_n_minutes: float | None = None, keep: int = 2) -> None:
        """See the class.

        Raises:
            SettingError: if an interval or ``keep`` is not positive.
        """
        super().__init__()
        for name, value in (("every_n_turns", every_n_turns), ("every_n_minutes", every_n_minutes), ("keep", keep)):
            if value is not None and not value > 0:
                raise SettingError(f"TurnCheckpoint.{name} must be positive, got {value}")
        self.every_n_turns = every_n_turns
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.signals = StopSignals()
        self._last_saved_at = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Several ranks take over the signals now: Lightning's handlers, which hang, are left out."""
        if ranks.world() > 1:
            self.signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals (Lightning has installed its own by now), and save position 0 of a new run.

        From here on ``--ckpt_path last`` works, also after a kill before the first scheduled checkpoint.
        """
        self._last_saved_at = time.monotonic()
        if ranks.world() == 1:
            self.signals.install()
        if trainer.is_global_zero:
            for leftover in RunDirectory(trainer.default_root_dir).checkpoints.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)  # a process killed while it wrote
        if trainer.global_step == 0:
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to.

        Raises:
            StopRequested: after saving, if a signal asked to stop.
        """
        # A signal may have reached one rank only, and clocks differ: all do what one must.
        stop = ranks.largest(self.signals.received or 0) or None
        if self._due(trainer) or stop is not None:
            self._save(trainer)
        if stop is not None:
            raise StopRequested(stop, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last turn is saved: what is left are scores, which a signal may cut short.

        Raises:
            StopRequested: if one has come already.
        """
        self.signals.nothing_left_to_save(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back; everything is saved."""
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back. Nothing is saved: the turn that failed may be half done.

        A SLURM job that was warned of its end goes into the queue again, now that everything is on disk.
        """
        self.signals.restore()
        warned = isinstance(exception, StopRequested) and exception.signum == slurm.REQUEUE_SIGNAL
        if warned and trainer.is_global_zero:
            log.warning("%s", slurm.requeue())

    def _due(self, trainer: Trainer) -> bool:
        turn = trainer.global_step
        by_count = self.every_n_turns is not None and turn % self.every_n_turns == 0
        passed = time.monotonic() - self._last_saved_at
        by_time = self.every_n_minutes is not None and ranks.broadcast(passed >= 60 * self.every_n_minutes)
        last = trainer.is_last_batch or turn == trainer.max_steps or trainer.should_stop
        return by_count or by_time or last

    def _save(self, trainer: Trainer) -> None:
        run = RunDirectory(trainer.default_root_dir)
        file = run.checkpoints / f"turn={trainer.global_step}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)
        if trainer.is_global_zero:
            _point(run.last_checkpoint, file)
            self._prune(run, newest=file)
        hand_back()
        self._last_saved_at = time.monotonic()

    def _prune(self, run: RunDirectory, newest: Path) -> None:
        others = [file for file in run.turn_checkpoints() if file != newest]
        for old in others[self.keep - 1 :]:
            old.unlink(missing_ok=True)


def _point(last: Path, file: Path) -> None:
    """Make ``last`` the same file as ``file``: a hard link, put in place by one rename."""
    temporary = last.with_name(f".{last.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(file, temporary)
    temporary.replace(last)
    flush_directory(last.parent)
