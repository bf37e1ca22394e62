"""Puts the warm-up stream into the run."""

from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from stableedit_pl.data.stream import EditStream
from stableedit_pl.data.turns import WarmUpMode, WarmUpPosition, WarmUpSettings
from stableedit_pl.errors import SettingError
from stableedit_pl.method.normalization import Normalization


class WarmUp(Callback):
    """Warm-up turns make the LN statistics reliable before (or while) the target edits are applied.

    They are ordinary turns, resumable like all others, marked ``phase: warmup`` and left out of the scores. Where no
    warm-up stream is given, ``mode: statistics_only`` feeds the statistics from the stream's own first turns before
    these are applied; their rows are counted once.

    Args:
        position: where in the target stream they come: ``start``, ``q1``, ``middle``, ``q3``, ``end`` or ``none``.
        mode: ``edit`` applies them to the weights too (as the paper), ``statistics_only`` only feeds the statistics.
        turns: use only the first so many turns of the warm-up stream; null for all. Of the stream's own, null for those
            with two answer tokens for each dimension of the model's hidden state.
        normalization: method of warm-up turns; null for the editor's own.
    """

    def __init__(
        self,
        position: WarmUpPosition = "start",
        mode: WarmUpMode = "edit",
        turns: int | None = None,
        normalization: Normalization | None = None,
    ) -> None:
        """See the class.

        Raises:
            SettingError: if ``turns`` is not positive.
        """
        if turns is not None and turns < 1:
            raise SettingError(f"WarmUp.turns must be at least 1, got {turns}; position: none leaves the warm-up out")
        self.settings = WarmUpSettings(position, mode, turns, normalization)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["fit"] | str) -> None:
        """Tell the stream how the warm-up enters it.

        Raises:
            MisconfigurationException: if the data is no EditStream, or the warm-up is longer than the horizon.
        """
        if stage != "fit":
            return
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(stream, EditStream):
            raise MisconfigurationException("WarmUp needs an EditStream as the data module")
        if sum(isinstance(callback, WarmUp) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "two WarmUp callbacks: a stream has one warm-up. In a second configuration file, callbacks: replaces "
                "the first file's list and callbacks+: adds to it"
            )
        stream.use_warm_up(self.settings)
        schedule = stream.schedule
        end_of_warmup = schedule.first_warmup_turn + schedule.warmup_turns
        if schedule.warmup_turns and 0 < trainer.max_steps < end_of_warmup:
            raise MisconfigurationException(
                f"trainer.max_steps={trainer.max_steps} ends before the warm-up does (turn {end_of_warmup}): warm-up "
                "turns count. Raise max_steps, or use WarmUp(turns=...) for a shorter warm-up."
            )
