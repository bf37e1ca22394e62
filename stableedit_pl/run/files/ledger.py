"""Append-only JSONL files with a running hash: the ledger of applied edits, and the list of rejected ones.

Every line is a JSON object whose ``hash`` is the SHA-256 (first 32 hex digits) of the line before's hash and of the
line without its own: no line can be changed, dropped or put in without breaking the chain from there on.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from stableedit_pl.run.files.directory import flush_to_disk


class LedgerError(ValueError):
    """A ledger that is not what the checkpoint says, or whose chain is broken."""


@dataclass(frozen=True)
class Position:
    """How far a ledger goes.

    Attributes:
        lines: number of lines.
        size: their bytes.
        hash: of the last line; empty before the first.
    """

    lines: int = 0
    size: int = 0
    hash: str = ""


def chained(previous: str, entry: Mapping[str, Any]) -> str:
    """Hash of an entry that follows a line with hash ``previous``."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(f"{previous}{json.dumps(content, ensure_ascii=False)}".encode()).hexdigest()[:32]


class Ledger:
    """One file that is written at its end.

    Args:
        path: the file.
        position: where it stands; what comes after is cut off, for it belongs to turns that are applied again.

    Raises:
        LedgerError: if the file does not reach ``position``, or is another one there.
    """

    def __init__(self, path: Path, position: Position) -> None:
        """See the class."""
        self.path = path
        self.position = position
        self._file: IO[str] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if position.lines == 0:
            path.unlink(missing_ok=True)
            return
        size = path.stat().st_size if path.exists() else 0
        if size < position.size:
            raise LedgerError(
                f"{path} has {size} bytes, but the checkpoint knows {position.lines} lines in {position.size} bytes: "
                "put back the run's own file, or start a new run"
            )
        with path.open("r+b") as file:
            if _last_hash(file, position.size) != position.hash:
                raise LedgerError(
                    f"{path}: line {position.lines} is not the one the checkpoint knows: put back the run's own file, "
                    "or start a new run"
                )
            file.truncate(position.size)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write entries, each with its hash; the first makes the file."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        lines, size, last = self.position.lines, self.position.size, self.position.hash
        for entry in entries:
            last = chained(last, entry)
            line = json.dumps({**entry, "hash": last}, ensure_ascii=False) + "\n"
            self._file.write(line)
            lines, size = lines + 1, size + len(line.encode())
        self._file.flush()
        self.position = Position(lines, size, last)

    def sync(self) -> None:
        """Wait until what is written is on disk."""
        if self._file is not None:
            flush_to_disk(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """The position as plain values."""
        return asdict(self.position)


def read_ledger(path: Path) -> Iterator[tuple[dict[str, Any], Position]]:
    """Entries of a ledger, each with the position after it, the chain checked on the way.

    A last line without its end is no entry yet: the run is writing it, or was killed while it did.

    Raises:
        LedgerError: at the first line that is no JSON object or breaks the chain.
    """
    position = Position()
    with path.open("rb") as file:
        for line in file:
            number = position.lines + 1
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                given = entry["hash"]
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerError(f"{path}, line {number}: is no entry of a ledger ({error})") from error
            if given != chained(position.hash, entry):
                raise LedgerError(
                    f"{path}, line {number}: its hash does not follow from the line and the one before: one of them "
                    "was changed, dropped or put in"
                )
            position = Position(number, position.size + len(line), given)
            yield entry, position


def _last_hash(file: IO[bytes], size: int) -> str | None:
    """The hash in the line that ends at byte ``size``; None if no line ends there."""
    begin = max(0, size - (1 << 16))
    file.seek(begin)
    lines = file.read(size - begin).splitlines(keepends=True)
    if not lines or not lines[-1].endswith(b"\n"):
        return None
    try:
        return str(json.loads(lines[-1])["hash"])
    except (ValueError, KeyError, TypeError):
        return None
