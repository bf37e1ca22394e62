"""From a file to its rows: everything that can be wrong before a row's fields are looked at."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stableedit_pl.data.readers.recognition import find_rows
from stableedit_pl.data.records import DataError, Problem, kind_of

_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file.

    Attributes:
        number: Counted from 1: the line of a JSONL file (blank lines count), the element of a JSON array.
        place: The same in words, such as `line 7` or `element 7 (line 58)`.
        fields: The row's fields; empty when `problem` says that the row is none.
        problem: Why the row cannot be used at all, if so.
    """

    number: int
    place: str
    fields: dict[str, object]
    problem: Problem | None = None


def file_checksum(path: str | Path) -> str:
    """Compute a file's SHA-256, to name in the results which data a score was taken on.

    Args:
        path: Any file.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(path, [_unreadable(Path(path), error)]) from error


def iterate_rows(path: str | Path, allow_array: bool = True, dataset: str = "edits") -> Iterator[Row]:
    """Go through the rows of a JSON array or of a JSONL file; the first character tells which.

    A broken line spoils one row of a JSONL file. A broken place in an array spoils the rest of the file, because
    nothing says where the next element starts.

    Args:
        path: File in UTF-8.
        allow_array: Whether a JSON array is accepted.
        dataset: The data set that is expected, for what is said of other files.

    Yields:
        Rows in file order; blank lines are none.

    Raises:
        DataError: If the file cannot be read, is empty, is no UTF-8, or is a broken or unexpected array.
    """
    text = _read_text(path)
    start = _skip_blank(text, 0)
    if start == len(text):
        raise DataError(path, [Problem("is empty", "Check that it was written or copied in full.")])
    if text[start] != "[":
        _refuse_one_object(path, text, start, dataset)
        yield from _jsonl_rows(text)
    elif allow_array:
        yield from _array_rows(path, text, start + 1)
    else:
        remedy = (
            "Write one JSON object per line: remove the enclosing [ ] and the commas between rows, or convert it "
            "with `jq -c '.[]'`."
        )
        first = next(_array_rows(path, text, start + 1), None)
        found = None if first is None or first.problem else find_rows([first.fields])
        if found is not None and found.dataset != "edits":
            remedy = f"It has rows {found}. {found.remedy(dataset, path)}"
        raise DataError(path, [Problem("is a JSON array, but this data set is JSONL", remedy)])


def _refuse_one_object(path: str | Path, text: str, start: int, dataset: str) -> None:
    """Refuse a file that is one object over several lines, and say what is in it; anything else is JSONL.

    Raises:
        DataError: If it is.
    """
    line = text[start : text.find("\n", start) % (len(text) + 1)]
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        pass
    else:
        return
    try:
        whole = json.loads(text[start:])
    except (ValueError, RecursionError):
        return
    found = find_rows(whole)
    names = ", ".join(f'"{name}"' for name in list(whole)[:5]) + (", ..." if len(whole) > 5 else "")
    problem = f"is one JSON object over several lines, with {names or 'nothing in it'}"
    remedy = "Write one row a line."
    if found is not None:
        remedy = f"It has rows {found}. {found.remedy(dataset, path)}"
    raise DataError(path, [Problem(problem, remedy)])


class _Decoder:
    """A JSON decoder that notices a key given twice, of which the standard one silently drops the first."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str, start: int = 0) -> tuple[object, int]:
        self.repeated = []
        return self._json.raw_decode(text, start)

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            self.repeated += sorted({name for name in names if names.count(name) > 1})
        return fields

    def row(self, value: object, number: int, place: str) -> Row:
        if not isinstance(value, dict):
            remedy = "Write each row as one object: { field: value, ... }."
            return Row(number, place, {}, Problem(f"is {kind_of(value)}, not an object", remedy, None, number, place))
        if self.repeated:
            remedy = "Keep one of them: only one value can be meant."
            return Row(number, place, value, Problem("is given twice", remedy, self.repeated[0], number, place))
        return Row(number, place, value)


def _jsonl_rows(text: str) -> Iterator[Row]:
    decoder = _Decoder()
    # Not splitlines(): it also breaks at characters such as U+2028, which JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        start = _skip_blank(line, 0)
        if start == len(line):
            continue
        place = f"line {number}"
        try:
            value, end = decoder.decode(line, start)
            if _skip_blank(line, end) < len(line):
                raise json.JSONDecodeError("text after the end of the row", line, _skip_blank(line, end))
        except (ValueError, RecursionError) as error:
            column = error.pos + 1 if isinstance(error, json.JSONDecodeError) else start + 1
            problem = f"is no valid JSON at column {column} ({_reason(error)})"
            remedy = "Repair the line: a row is one complete JSON object on one line."
            yield Row(number, place, {}, Problem(problem, remedy, None, number, place))
        else:
            yield decoder.row(value, number, place)


def _array_rows(path: str | Path, text: str, position: int) -> Iterator[Row]:
    # Element by element: the whole file as dictionaries takes several times the memory of its records.
    decoder = _Decoder()
    one_line = "\n" not in text.rstrip()
    number, line, counted = 0, 1, 0
    position = _skip_blank(text, position)
    closed = text[position : position + 1] == "]"
    while not closed:
        number += 1
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.decode(text, position)
            end = _skip_blank(text, end)
            if text[end : end + 1] not in ("]", ","):
                raise json.JSONDecodeError("expected ',' or ']' after an element", text, end)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise _broken_array(path, text, at, f"{_reason(error)}, in element {number}") from error
        yield decoder.row(value, number, f"element {number}" if one_line else f"element {number} (line {line})")
        closed = text[end] == "]"
        position = end if closed else _skip_blank(text, end + 1)
    after = _skip_blank(text, position + 1)
    if after < len(text):
        raise _broken_array(path, text, after, "text after the end of the array")


def _broken_array(path: str | Path, text: str, position: int, reason: str) -> DataError:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    remedy = "Repair that place; if the file is cut short, fetch or copy it again."
    problem = f"is no valid JSON at line {line}, column {column} ({reason})"
    return DataError(path, [Problem(problem, remedy)])


def _read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, [_unreadable(Path(path), error)]) from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {error.start} ({error.reason})"
        remedy = "Save the file as UTF-8; if it is compressed, unpack it first."
        raise DataError(path, [Problem(problem, remedy)]) from error


def _unreadable(path: Path, error: OSError) -> Problem:
    if os.path.isdir(path):  # unlike Path.is_dir, it does not raise where a parent may not be searched
        return Problem("is a directory", "Give the path of one file in it.")
    if isinstance(error, FileNotFoundError):
        try:
            near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
        except OSError:
            near = []
        remedy = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
        return Problem("does not exist", remedy + f" A relative path starts at {Path.cwd()}.")
    if isinstance(error, PermissionError):
        return Problem("must not be read (permission denied)", "Give yourself the right to read it (chmod u+r).")
    return Problem(f"cannot be read ({error.strerror or error})", "Check the path and the disk.")


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return message[:1].lower() + message[1:].removesuffix(" at")
