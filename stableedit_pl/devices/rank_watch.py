"""Who of the other ranks is still there: heartbeats through the store that the ranks met at.

A lost rank shows in one of two ways. Gloo's connections break at once, and a collective raises; NCCL, or a start-up,
may wait for ever. So every process beats in a thread of its own, which also works while its main thread computes; a
rank without a beat is named, and a process that cannot leave its collective is ended.
"""

import logging
import os
import threading
import time
from typing import Any

log = logging.getLogger(__name__)

BEAT = 0.5
"""Seconds between beats."""

ROLL_CALL = 6 * BEAT
"""How long a rank may be silent, once a collective has failed, before it is taken for lost."""

ENDED, FAILED = "ended", "failed: "
"""What stands in a beat's place when a rank has left on its own."""


class RankWatch(threading.Thread):
    """Beats for this rank, and listens for the others.

    Args:
        store: the ranks' key-value store (a connection that nobody else uses).
        rank: this process.
        world: number of ranks.
        silence: seconds without a beat after which a rank is lost; half as long again, and this process ends.
    """

    def __init__(self, store: Any, rank: int, world: int, silence: float) -> None:
        """See the class."""
        super().__init__(daemon=True, name="rank watch")
        self.store, self.rank, self.world, self.silence = store, rank, world, silence
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._beats = 0

    def run(self) -> None:
        """Beat until this rank leaves; end the process when another is lost and this one does not notice."""
        heard: dict[int, tuple[str, float]] = {}
        lost_since: float | None = None
        while not self._left.wait(BEAT):
            now = time.monotonic()
            self._beat()
            beats = self._read()
            for rank in self._others():
                beat = "" if beats is None else beats[rank]
                if rank not in heard or (beats is not None and heard[rank][0] != beat):
                    heard[rank] = (beat, now)
            lost = [rank for rank, (beat, since) in heard.items() if _gone(beat) or now - since > self.silence]
            lost_since = (lost_since or now) if lost else None
            if lost_since is not None and now - lost_since > self.silence / 2:
                log.critical("%s. Rank %d stops.", lost_ranks(lost), self.rank)
                os._exit(1)

    def missing(self) -> list[int]:
        """Call the roll: the ranks that give no sign of life now, less those that left because of another."""
        first = self._read()
        waited = time.monotonic() + ROLL_CALL
        while time.monotonic() < waited:
            time.sleep(BEAT)
            self._beat()
        second = self._read()
        if first is None or second is None:
            return [0]  # the store is where rank 0 is, or its launcher
        silent = [rank for rank in self._others() if first[rank] == second[rank]]
        return [rank for rank in silent if not second[rank].startswith(FAILED)] or silent

    def leave(self, problem: str | None = None) -> None:
        """Stop beating, with a word to the others whether this rank ended or failed."""
        if not self._left.is_set():
            self._left.set()
            with self._lock:
                self._set(ENDED if problem is None else FAILED + problem)
            # An interpreter that ends while this thread is in the store's C++ aborts the process.
            if self.is_alive():
                self.join(ROLL_CALL)

    def wait_for_others(self) -> None:
        """Stay until the others have left or fallen silent: the store goes with this process, and they still ask it."""
        deadline = time.monotonic() + 4 * ROLL_CALL
        while time.monotonic() < deadline:
            first = self._read()
            time.sleep(2 * BEAT)
            second = self._read()
            if first is None or second is None or all(first[rank] == second[rank] for rank in self._others()):
                return

    def said(self, rank: int) -> str | None:
        """What a failed rank said of itself."""
        beats = self._read()
        beat = "" if beats is None else beats[rank]
        return beat.removeprefix(FAILED) if beat.startswith(FAILED) else None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def _beat(self) -> None:
        with self._lock:
            if not self._left.is_set():
                self._beats += 1
                self._set(str(self._beats))

    def _set(self, value: str) -> None:
        try:
            self.store.set(f"beat/{self.rank}", value)
        except RuntimeError as error:
            log.debug("no beat: %s", error)

    def _read(self) -> dict[int, str] | None:
        """Everybody's beat, empty before the first; None when the store is gone."""
        try:
            return {
                rank: self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""
                for rank in range(self.world)
            }
        except RuntimeError as error:
            log.debug("no store: %s", error)
            return None


def lost_ranks(ranks: list[int]) -> str:
    """How a loss is reported."""
    which = f"Rank {ranks[0]} is" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))} are"
    return f"{which} lost: killed, crashed or cut off"


def _gone(beat: str) -> bool:
    return beat.startswith(FAILED)
