"""Reading a whole file: bad rows are refused together or left out aloud, and nothing is missed in silence."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_files import EDIT, MEND, Write, message

from stableedit_pl.data.readers import read_records
from stableedit_pl.data.records import DataError, Probe


def test_all_bad_rows_are_listed_with_the_way_out(write: Write) -> None:
    rows = [MEND | ({"alt": ""} if i in (3, 5) else {}) for i in range(8)]
    error = message(
        "zsre", write(rows), ["2 problems in 2 rows", "line 4, field", "line 6, field", "--data.on_bad_row skip"]
    )
    assert [problem.row for problem in error.problems] == [4, 6]


def test_long_list_of_bad_rows_is_cut_in_the_message_only(write: Write) -> None:
    error = message("edits", write([EDIT] + [EDIT | {"target": ""}] * 25), ["25 problems in 25", "... and 5 more"])
    assert len(error.problems) == 25


def test_skip_keeps_the_good_rows_and_says_what_it_left_out(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write([EDIT, EDIT | {"target": ""}, EDIT, {"prompt": "p"}, EDIT])
    with caplog.at_level(logging.WARNING):
        records = read_records("edits", path, on_bad_row="skip")
    assert [record.id for record in records] == ["1", "3", "5"]
    (entry,) = caplog.records
    assert (entry.name, entry.levelname) == ("stableedit_pl.data.readers", "WARNING")
    assert f"{path}: left out 2 of 5 rows (2, 4)" in entry.getMessage()
    assert 'line 4, field "target": is missing' in entry.getMessage()


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_file_without_one_good_row_is_refused(on_bad_row: Any, write: Write) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_records("edits", write([EDIT | {"target": ""}]), on_bad_row=on_bad_row)


def test_fields_a_data_set_should_have_are_missed_aloud(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    bare = {"src": "s", "ans": "a"}
    assert [record.locality for record in read_records("zsre", write([MEND, bare]))] == [(Probe("l", "m"),), ()]
    said = [entry.getMessage().split(": ", 1)[1] for entry in caplog.records]
    assert said == [
        '1 of 2 rows have no "rephrase"; generalization cannot be measured on them.',
        '1 of 2 rows have no "loc"; specificity cannot be measured on them.',
    ]


@pytest.mark.parametrize(
    ("arguments", "substance"),
    [
        (
            {"dataset": "zrse"},
            'dataset "zrse" is unknown. Did you mean "zsre"? Choose one of: edits, zsre, counterfact',
        ),
        ({"dataset": "edits", "on_bad_row": "drop"}, 'on_bad_row "drop" is unknown. Choose one of: raise, skip.'),
    ],
)
def test_unknown_choice_lists_the_known(arguments: dict[str, Any], substance: str, write: Write) -> None:
    with pytest.raises(ValueError) as caught:
        read_records(path=write([EDIT]), **arguments)
    assert substance in str(caught.value)


def test_readers_themselves_need_the_standard_library_only() -> None:
    folder = Path(sys.modules["stableedit_pl.data.readers"].__file__ or "").parent
    # A stand-in package keeps the real one's __init__, which is not this test's matter, from running.
    code = (
        "import sys, types; package = types.ModuleType('stableedit_pl'); package.__path__ = [sys.argv[1]];"
        "sys.modules['stableedit_pl'] = package; import stableedit_pl.data.readers;"
        "assert not {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder.parent)], check=True)
