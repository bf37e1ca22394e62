"""Readers: one call turns a file of any supported data set into edit records."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Literal

from stableedit_pl.data.readers.layouts import LAYOUTS, Layout, is_absent
from stableedit_pl.data.readers.parser import RowParser
from stableedit_pl.data.readers.recognition import find_rows
from stableedit_pl.data.readers.rows import file_checksum, iterate_rows
from stableedit_pl.data.records import DataError, EditRecord, Problem, list_problems

__all__ = ["DATASETS", "file_checksum", "read_records"]

DATASETS: tuple[str, ...] = tuple(LAYOUTS)
"""Names that `read_records` knows."""

_log = logging.getLogger(__name__)


def read_records(
    dataset: str, path: str | Path, *, on_bad_row: Literal["raise", "skip"] = "raise", most: int | None = None
) -> list[EditRecord]:
    """Read a data set.

    Texts are kept as they stand: ZsRE's `nq question: ` stays, and no question mark is appended to a locality
    prompt, although some published programs do so. The order is the file's.

    Args:
        dataset: One of `DATASETS`.
        path: File in UTF-8; JSONL for `edits`, JSONL or a JSON array for the others.
        on_bad_row: `raise` refuses the file if any row is bad and lists all of them; `skip` leaves bad rows out and
            logs how many and which. A file in which no row is good is refused either way.
        most: Stop behind so many records; what comes after is not looked at. None for all.

    Returns:
        One record per row, in file order.

    Raises:
        DataError: If the file cannot be read or a row is bad.
        ValueError: If `dataset` or `on_bad_row` is unknown.
    """
    _require_choice("dataset", dataset, DATASETS)
    _require_choice("on_bad_row", on_bad_row, ("raise", "skip"))
    layout = LAYOUTS[dataset]
    records: list[EditRecord] = []
    problems: list[Problem] = []
    places: dict[str, str] = {}
    lacking = dict.fromkeys(layout.expected(), 0)
    unlike: object = None
    for row in iterate_rows(path, allow_array=not layout.is_own, dataset=dataset):
        if row.problem:
            problems.append(row.problem)
            continue
        parser = RowParser(layout, row.fields, row.number, row.place)
        record = parser.parse()
        if record is None:
            problems += parser.problems
            if unlike is None and not layout.accepts(row.fields):
                unlike = [row.fields] if row.place.startswith("element") else row.fields
        elif record.id in places:
            problems.append(_duplicate(record, layout, row.place, places[record.id]))
        else:
            places[record.id] = row.place
            records.append(record)
            for field in lacking:
                lacking[field] += is_absent(row.fields, field)
            if len(records) == most:
                break
    if problems and (on_bad_row == "raise" or not records):
        raise DataError(path, problems, _hint(bool(records), unlike, dataset, path))
    if problems:
        _warn_left_out(path, problems, len(records))
    elif not records:
        raise DataError(path, [Problem("holds no rows", "Check that it was written or copied in full.")])
    for field, count in lacking.items():
        if count:
            text = '%s: %d of %d rows have no "%s"; %s cannot be measured on them.'
            _log.warning(text, path, count, len(records), field, layout.expected()[field])
    return records


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        guess = f'Did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'{name} "{value}" is unknown. {guess}Choose one of: {", ".join(choices)}.')


def _duplicate(record: EditRecord, layout: Layout, place: str, first: str) -> Problem:
    # Without an id field the ids are row numbers, which cannot collide.
    problem = f'"{record.id}" is already the id of {first}'
    remedy = "Give every row an id of its own; a row without one is named after its number."
    return Problem(problem, remedy, layout.id, record.row, place)


def _hint(any_good: bool, unlike: object, dataset: str, path: str | Path) -> str:
    if any_good:
        return "To use the other rows, set on_bad_row to skip (--data.on_bad_row skip): it lists those left out."
    found = None if unlike is None else find_rows(unlike)
    if found is None or (found.dataset is None and not LAYOUTS[dataset].names.isdisjoint(found.fields)):
        return ""  # of this data set, but for what the problems say
    under = "" if found.path in (".", ".[]") else f" under {found.path}"
    remedy = f" {found.remedy(dataset, path, by_line=not isinstance(unlike, list))}" if found.dataset else ""
    return f"No row is good. There are objects{under} {found}.{remedy}"


def _warn_left_out(path: str | Path, problems: list[Problem], good: int) -> None:
    rows = sorted({problem.row for problem in problems if problem.row is not None})
    numbers = ", ".join(map(str, rows))
    text = '%s: left out %d of %d rows (%s), because on_bad_row is "skip".\n%s'
    _log.warning(text, path, len(rows), len(rows) + good, numbers, list_problems(problems))
