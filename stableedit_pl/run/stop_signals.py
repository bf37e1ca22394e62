"""Ctrl-C, SIGTERM and SLURM's warning finish the turn; a second Ctrl-C stops at once."""

import signal
from types import FrameType
from typing import Any

from stableedit_pl.run import slurm


class StopRequested(BaseException):
    """A signal asked the run to stop; its last turn is complete and saved.

    A ``BaseException``, like ``KeyboardInterrupt``: no ``except Exception`` on the way up may swallow it.

    Args:
        signum: the signal.
        turns: committed turns.
    """

    def __init__(self, signum: int, turns: int) -> None:
        """See the class."""
        super().__init__(f"Stopped by {signal.Signals(signum).name} after turn {turns}")
        self.signum = signum
        self.turns = turns

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + self.signum


class StopSignals:
    """Handlers that only set a flag. Between turns the flag is read; inside one nothing is cut short."""

    SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

    @classmethod
    def heeded(cls) -> tuple[int, ...]:
        """Signals that ask to stop: in a SLURM job also the one it sends before its time is up."""
        warning = slurm.REQUEUE_SIGNAL if slurm.job() is not None else None
        return cls.SIGNALS if warning is None else (*cls.SIGNALS, warning)

    def __init__(self) -> None:
        """Nothing is installed yet."""
        self.received: int | None = None
        self._interrupts = 0
        self._saved_turns: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; outside the main thread, where Python does not allow it, do nothing."""
        self.restore()
        self.received, self._interrupts, self._saved_turns = None, 0, None
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in self.heeded()}
        except ValueError:
            self._previous = {}

    def nothing_left_to_save(self, turns: int) -> None:
        """From now on a signal stops the run where it is.

        Args:
            turns: committed turns.

        Raises:
            StopRequested: if a signal has come already.
        """
        self._saved_turns = turns
        if self.received is not None:
            raise StopRequested(self.received, turns)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        first, self.received = self.received is None, signum
        if first and self._saved_turns is not None:
            raise StopRequested(signum, self._saved_turns)
