"""One start of a run in its directory: it begins with the first turn, or leaves the directory as it was."""

from pathlib import Path
from types import TracebackType

from stableedit_pl.run.files.directory import RunDirectory, remove_empty
from stableedit_pl.run.files.lock import RunLock


class Opening:
    """Holds a run directory for the life of a run; a context manager.

    Much can still refuse a start while model, data and checkpoint are read. Until :meth:`first_turn`, leaving with an
    exception removes what this start has written; an old run is only replaced in :meth:`begin`.

    Args:
        run: the directory; need not exist.
        overwrite: a run that is there may be replaced.
    """

    def __init__(self, run: RunDirectory, overwrite: bool) -> None:
        """See the class."""
        self._run = run
        self._overwrite = overwrite
        self._lock = RunLock(run)
        self._made: list[Path] = []
        self._before: set[Path] = set()
        self._replaces = False
        self._under_way = False

    def __enter__(self) -> "Opening":
        """Make the directory and lock it.

        Raises:
            RunDirectoryError: if nothing can be written there, or another run has it.
        """
        self._made = self._run.make()
        try:
            self._lock.acquire()
        except BaseException:
            remove_empty(self._made)
            raise
        self._before = set(self._run.own_files())
        return self

    def checkpoint(self, ckpt_path: str | Path | None) -> Path | None:
        """The checkpoint file that the run goes on from; None for a new run.

        Args:
            ckpt_path: None, ``last`` or a file.

        Raises:
            RunDirectoryError: if there is none, it is another run's, or a new run would overwrite one unasked.
        """
        file = self._run.checkpoint(ckpt_path)
        self._run.refuse(file, self._overwrite)
        self._replaces = file is None and self._run.holds_run()
        return file

    def begin(self) -> None:
        """Everything is read and checked: the run that is replaced may go."""
        if self._replaces:
            self._run.clear(but=set(self._run.own_files()) - self._before)
            self._before = set()

    def first_turn(self) -> None:
        """The run is under way: from here on, what it has written stays."""
        self._under_way = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the directory back; after a refused start, as it was."""
        try:
            if error is not None and not self._under_way:
                self._run.clear(but=self._before)
        finally:
            self._lock.release()
            remove_empty(self._made)
