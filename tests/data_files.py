"""Rows and helpers shared by the tests of the readers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stableedit_pl.data.readers import read_records
from stableedit_pl.data.records import DataError

Write = Callable[..., Path]

EDIT = {"prompt": "The capital of Zubrowka is", "target": "Lutz"}
MEND = {
    "src": "Who founded Ostrelia?",
    "rephrase": "Ostrelia has which founder?",
    "alt": "Ada",
    "loc": "l",
    "loc_ans": "m",
}


def message(dataset: str, path: Path, substance: Sequence[str]) -> DataError:
    """Read a bad file; every part of the substance must be in what the user is told."""
    with pytest.raises(DataError) as caught:
        read_records(dataset, path)
    text = str(caught.value)
    assert text.startswith(str(path)), text
    assert [part for part in substance if part not in text] == [], text
    return caught.value
