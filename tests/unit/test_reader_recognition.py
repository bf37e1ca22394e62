"""Valid JSON of another layout: which fields it has, where, which data set has these, and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_files import EDIT, MEND, Write, message

from stableedit_pl.data.readers import read_records
from stableedit_pl.data.readers.recognition import find_rows
from stableedit_pl.data.records import DataError

ZSRE = f'with the fields {", ".join(MEND)}: these look like rows of the data set "zsre"'
QA = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("dataset", ["edits", "zsre"])
@pytest.mark.parametrize(
    ("value", "indent", "path", "also"),
    [
        ({"en": [MEND], "de": [MEND]}, 1, ".en[]", ['is one JSON object over several lines, with "en", "de"']),
        ({"en": [MEND], "de": [MEND]}, None, ".en[]", ["No row is good", "under .en[]"]),
        ({"en": MEND, "de": MEND}, None, ".en", ["No row is good", "under .en"]),
        ([{"en": MEND, "de": MEND}], None, ".[].en", []),
        ({"version": 2, "data": {"train": [MEND]}}, 2, ".data.train[]", []),
        ({"17": {"en": MEND}, "18": {"en": MEND}}, 1, ".[].en", []),
        ({"zh-cn": [MEND]}, 1, '.["zh-cn"][]', []),
    ],
)
def test_rows_inside_something_are_found(
    dataset: str, value: Any, indent: int | None, path: str, also: list[str], write: Write
) -> None:
    file = write(json.dumps(value, indent=indent), "rows.json")
    found = find_rows(value)
    assert found is not None and (found.path, found.dataset) == (path, "zsre")
    text = str(message(dataset, file, [ZSRE, f"jq -c '{path}' {file} > rows.jsonl", *also]))
    assert ("set --data.dataset zsre" in text) == (dataset == "edits")


def test_one_row_over_several_lines(write: Write) -> None:
    file = write(json.dumps(MEND, indent=1), "rows.json")
    message(
        "zsre", file, ["is one JSON object over several lines", ZSRE, f"Write the rows one a line, `jq -c '.' {file}"]
    )


def test_an_array_for_the_own_format_says_whose_it_is(write: Write) -> None:
    file = write([MEND], "rows.json", array=True)
    text = str(
        message("edits", file, ["is a JSON array, but this data set is JSONL", ZSRE, "Set --data.dataset zsre."])
    )
    assert "jq" not in text, "that data set may be an array"
    file = write([EDIT], "edits.json", array=True)
    message("zsre", file, ['"edits"', "jq -c '.[]'", "and set --data.dataset edits."])


def test_rows_one_a_line_need_the_name_alone(write: Write) -> None:
    text = str(message("edits", write([MEND]), [ZSRE, "Set --data.dataset zsre."]))
    assert "jq" not in text


@pytest.mark.parametrize("dataset", ["edits", "fever"])
@pytest.mark.parametrize("array", [True, False])
def test_fields_that_no_data_set_has_are_named_with_those_there_are(dataset: str, array: bool, write: Write) -> None:
    named = ["with the fields question, answer. No data set has these", "zsre: src, alt or ans", "fever: prompt, alt"]
    message(dataset, write([QA], "rows.json", array=array), named)


def test_a_row_that_only_lacks_its_target_is_no_other_layout(write: Write) -> None:
    assert "No data set" not in str(message("edits", write([{"prompt": "p"}]), ['field "target": is missing']))


def test_rows_behind_those_that_are_used_refuse_nothing(write: Write) -> None:
    bad: list[Any] = [EDIT, EDIT, {"prompt": "p"}, [], EDIT]
    path = write(bad)
    assert len(read_records("edits", path, most=2)) == 2
    with pytest.raises(DataError, match="line 3"):
        read_records("edits", path, most=3)
    assert [record.row for record in read_records("edits", path, on_bad_row="skip", most=3)] == [1, 2, 5]
    array = json.dumps([MEND, MEND, {"src": "s"}])[:-3]  # cut short
    assert len(read_records("zsre", write(array, "a.json"), most=2)) == 2
