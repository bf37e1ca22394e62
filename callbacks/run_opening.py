"""``RunOpening``: nothing of a run's files or curves is made before everything is checked."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from stableedit_pl.run.files.opening import Opening
from stableedit_pl.run.logger_history import LoggerHistories


class RunOpening(Callback):
    """Tells a run's :class:`Opening` when the run begins, and keeps loggers from beginning theirs before.

    Lightning asks every logger for its experiment (an event file, a page on a server) before it reads anything.
    ``EditTrainer`` hides them until then, and this callback, which comes first, hands them back: they begin with their
    first point. In a resumed run they go on behind what they had written up to the checkpoint.
    """

    def __init__(self) -> None:
        """No settings; ``EditTrainer`` sets what follows before each fit."""
        self.opening: Opening | None = None  # of rank zero alone
        self.loggers: list[Logger] | None = None
        self._histories: LoggerHistories | None = None  # likewise
        self._then: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """How far the loggers have come; what they hold in memory is written."""
        return {} if self._histories is None else self._histories.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how far they had come."""
        self._then = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the loggers back: callbacks look whether there are any."""
        if self.loggers is not None:
            trainer.loggers, self.loggers = self.loggers, None
        self._histories = None if self.opening is None else LoggerHistories(trainer.loggers)
        if self._histories is not None and trainer.ckpt_path is not None:
            self._histories.protect()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is read and checked.

        Raises:
            SettingError: if a logger would lose what it has written, and cannot be helped.
        """
        if self.opening is not None:
            self.opening.begin()
            if self._histories is not None and trainer.ckpt_path is not None:
                self._histories.resume(self._then, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A refused start leaves nothing beside the loggers' files."""
        if self._histories is not None:
            self._histories.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The run is under way."""
        if self.opening is not None:
            self.opening.first_turn()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """So is one that had no turn left, and only takes its final scores."""
        if self.opening is not None:
            self.opening.first_turn()
