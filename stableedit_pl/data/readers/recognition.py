"""What a file of another layout is: where in its JSON the rows are, and which data set has their fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stableedit_pl.data.readers.layouts import LAYOUTS

_DEEPEST = 4
_SHOWN = 8
_TRIED = 20


@dataclass(frozen=True, slots=True)
class Found:
    """Where rows are.

    Attributes:
        path: To all of them, as `jq` has it: `.`, `.[]`, `.en[]`.
        fields: Names of the first row's fields.
        dataset: The data set that has these; None if none has.
    """

    path: str
    fields: tuple[str, ...]
    dataset: str | None

    def __str__(self) -> str:
        """Say which fields there are, and whose they are."""
        shown = ", ".join(self.fields[:_SHOWN]) + (", ..." if len(self.fields) > _SHOWN else "")
        if self.dataset is None:
            known = "; ".join(
                f"{name}: {layout.prompt}, {' or '.join(layout.target)}" for name, layout in LAYOUTS.items()
            )
            return f"with the fields {shown or 'none'}. No data set has these; prompt and target are called in {known}"
        return f'with the fields {shown}: these look like rows of the data set "{self.dataset}"'

    def remedy(self, asked: str, path: object, by_line: bool = False) -> str:
        """Say what to do.

        Args:
            asked: The data set that was asked for.
            path: The file.
            by_line: Whether the file is JSONL, so that what stands at `.` can stay.
        """
        option = f"--data.dataset {self.dataset}" if self.dataset not in (None, asked) else ""
        convert = f"write the rows one a line, `jq -c '{self.path}' {path} > rows.jsonl`"
        # Arrays are read as they are, but for this project's own format.
        plain = (self.path == "." and by_line) or (self.path == ".[]" and self.dataset not in (None, "edits"))
        steps = [step for step in ("" if plain else convert, f"set {option}" if option else "") if step]
        said = ", and ".join(steps) or "check the file"
        return f"{said[:1].upper()}{said[1:]}."


def dataset_of(fields: Mapping[str, object]) -> str | None:
    """Name the data set whose prompt and target a row has; None if there is none."""
    return next((name for name, layout in LAYOUTS.items() if layout.accepts(fields)), None)


def find_rows(value: object) -> Found | None:
    """Look for rows in a JSON value: in arrays, under a language, under the name of a split, under ids.

    Args:
        value: Of a whole file, or of one row.

    Returns:
        The first rows that a data set has; else the first objects; None if there are none.
    """
    return _known_rows(value, "", _DEEPEST) or _any_rows(value, "", _DEEPEST)


def _known_rows(value: object, path: str, depth: int) -> Found | None:
    if isinstance(value, Mapping) and (dataset := dataset_of(value)):
        return Found(path or ".", tuple(value), dataset)
    for name, inner in _inside(value, path) if depth else ():
        if found := _known_rows(inner, name, depth - 1):
            return found
    return None


def _any_rows(value: object, path: str, depth: int) -> Found | None:
    for name, inner in _inside(value, path) if depth else ():
        if found := _any_rows(inner, name, depth - 1):
            return found
    return Found(path or ".", tuple(value), None) if isinstance(value, Mapping) else None


def _inside(value: object, path: str) -> list[tuple[str, object]]:
    """Objects and arrays in a value, each with its path; of an array, the first."""
    if isinstance(value, list):
        return [(f"{path or '.'}[]", inner) for inner in value[:1]]
    if not isinstance(value, Mapping):
        return []
    names = list(value)[:_TRIED]
    if len(value) > 1 and all(str(name).isdigit() for name in names):  # rows by their ids
        return [(f"{path or '.'}[]", value[names[0]])]
    return [
        (f"{path}.{name}" if re.fullmatch(r"[A-Za-z_]\w*", name) else f'{path or "."}["{name}"]', value[name])
        for name in names
        if isinstance(value[name], (Mapping, list))
    ]
