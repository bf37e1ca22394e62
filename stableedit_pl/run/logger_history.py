"""What loggers have written, and how a resumed run goes on behind it.

Lightning's CSVLogger deletes its file when it begins, and those with numbered versions begin a new one.
"""

import csv
import itertools
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from stableedit_pl.errors import SettingError

log = logging.getLogger(__name__)

History = Mapping[str, Mapping[str, Any]]
"""Logger, as ``CSVLogger-0``, to its ``version`` and, of a CSVLogger, its number of ``rows``."""


class LoggerHistories:
    """How far each of a run's loggers has come; loading and saving are up to the callback that has this.

    Args:
        loggers: of one process, which writes.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        """See the class."""
        self._loggers = list(loggers)
        self._counts: dict[str, _Rows] = {}
        self._protected: list[Path] = []

    def state(self) -> dict[str, dict[str, Any]]:
        """All loggers' histories as plain values; what a CSVLogger still holds in memory is written before."""
        found: dict[str, dict[str, Any]] = {}
        for name, logger in _named(self._loggers):
            version = logger.version
            found[name] = {"version": version if isinstance(version, (int, str)) else None}
            if isinstance(logger, CSVLogger) and logger._experiment is not None:
                logger.save()
                rows = self._counts.setdefault(name, _Rows(Path(logger.experiment.metrics_file_path)))
                found[name]["rows"] = rows.count()
        return found

    def protect(self) -> None:
        """Before anything may log: keep the files that a CSVLogger deletes when it begins, under another name."""
        for logger in self._loggers:
            if isinstance(logger, CSVLogger) and logger._version is not None and logger._experiment is None:
                file = Path(logger.log_dir) / "metrics.csv"
                if file.is_file():
                    _kept(file).unlink(missing_ok=True)
                    os.link(file, _kept(file))
                    self._protected.append(_kept(file))

    def forget(self) -> None:
        """The start was refused: remove what :meth:`protect` has made."""
        for kept in self._protected:
            kept.unlink(missing_ok=True)
        self._protected = []

    def resume(self, history: History, turn: int) -> None:
        """Have every logger go on where a checkpoint found it, before it begins.

        Args:
            history: as in :meth:`state`; empty for a checkpoint that knows none.
            turn: committed turns of the checkpoint.

        Raises:
            SettingError: if a CSVLogger's file is not on this machine, where it could not be kept.
        """
        for name, logger in _named(self._loggers):
            then = history.get(name, {})
            if isinstance(logger, (CSVLogger, TensorBoardLogger)):
                if logger._version is None and then.get("version") is not None:
                    logger._version = then["version"]  # else the next number that is free
                if isinstance(logger, CSVLogger):
                    _resume_csv(logger, then.get("rows"), turn)
            elif then.get("version") is not None and str(logger.version) != str(then["version"]):
                log.warning(
                    "%s goes on in %s; what it logged up to turn %d is in %s. To have both in one, give it that name "
                    "when you resume (WandbLogger: id, MLFlowLogger: run_id, CometLogger: experiment_key).",
                    type(logger).__name__,
                    logger.version,
                    turn,
                    then["version"],
                )


def _named(loggers: Sequence[Logger]) -> Iterator[tuple[str, Logger]]:
    seen: Counter[str] = Counter()
    for logger in loggers:
        kind = type(logger).__name__
        yield f"{kind}-{seen[kind]}", logger
        seen[kind] += 1


def _resume_csv(logger: CSVLogger, rows: int | None, turn: int) -> None:
    """Keep the rows up to the checkpoint; those of turns that are applied again go."""
    if "://" in str(logger.log_dir):
        raise SettingError(
            f"CSVLogger would delete what it has written in {logger.log_dir} when the run is resumed, and it can only "
            "be kept on a disk of this machine: give it another save_dir, or resume without it"
        )
    file = Path(logger.log_dir) / "metrics.csv"
    kept = _kept(file)
    if logger._experiment is not None:
        logger.save()
    # Protected at this start, or left there by a process that was killed between the two renames below.
    source = kept if kept.is_file() else file
    if not source.is_file():
        return
    header, lines = _rows_until(source, rows, turn)
    temporary = kept.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, header)
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Previous log files in this directory will be deleted")
        experiment = logger.experiment  # deletes the file
    os.replace(kept, file)
    experiment.metrics_keys = list(header)


def _kept(file: Path) -> Path:
    return file.with_name(f".{file.name}.kept")


def _rows_until(file: Path, rows: int | None, turn: int) -> tuple[list[str], list[dict[str, str]]]:
    with file.open(newline="", encoding="utf-8") as content:
        reader = csv.DictReader(content)
        header = list(reader.fieldnames or [])
        if rows is not None:
            return header, list(itertools.islice(reader, rows))
        whole = (row for row in reader if None not in row.values())  # the last may be half written
        return header, [row for row in whole if row.get("step", "").isdigit() and int(row["step"]) <= turn]


class _Rows:
    """Counts a CSV file's rows; goes only through what is new, unless columns were added."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._header, self._offset, self._rows = b"", 0, 0

    def count(self) -> int:
        if not self._file.is_file():
            return 0
        with self._file.open("rb") as content:
            header = content.readline()
            if header != self._header:
                self._header, self._offset, self._rows = header, len(header), 0
            content.seek(self._offset)
            while piece := content.read(1 << 20):
                self._rows += piece.count(b"\n")
                self._offset += len(piece)
        return self._rows
