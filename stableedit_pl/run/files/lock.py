"""The lock of a run directory: one run at a time, and nothing to clear away after a crash."""

import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stableedit_pl.run.files.directory import RunDirectory, RunDirectoryError

log = logging.getLogger(__name__)


class RunLock:
    """The operating system's own lock on a file in the run directory, which ends with the process that holds it.

    Only ``fit`` takes it, in the process of rank zero. Whoever reads a run needs none: all its files are replaced as a
    whole or grow at their end.

    Args:
        run: the directory; it must exist.
    """

    def __init__(self, run: RunDirectory) -> None:
        """See the class."""
        self._run = run
        self._file: Path = run.lock
        self._lock = FileLock(self._file, timeout=0)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunDirectoryError: if another run has it; the message says which process of which machine.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise RunDirectoryError(
                f"{self._run.path} is in use by another run{self._holder()}: two runs in one directory would spoil "
                "each other. Wait for its end or stop it (Ctrl-C saves), or choose another --run_dir."
            ) from None
        except FileNotFoundError:
            raise RunDirectoryError(
                f"--run_dir {self._run.path} was removed while the run started; start again"
            ) from None
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): a second run in it would not be noticed.", self._run.path, error)
            return
        # For the message above alone; a process that was killed leaves it behind, unlocked.
        with suppress(OSError):
            self._file.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")

    def release(self) -> None:
        """Give the lock back and remove its file; does nothing without it."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows keeps open files; whoever takes the lock next uses this one
                self._file.unlink()
            self._lock.release()

    def _holder(self) -> str:
        try:
            said = self._file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            said = ""
        return f" ({said})" if said else ""
