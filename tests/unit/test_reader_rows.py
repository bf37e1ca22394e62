"""Every way a file can be wrong before its fields matter: path, encoding, JSON, and where each row stands."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from data_files import EDIT, MEND, Write, message

from stableedit_pl.data.readers import file_checksum, read_records
from stableedit_pl.data.records import DataError


@pytest.mark.parametrize(
    ("line", "substance"),
    [
        ('["p", "t"]', ["line 3: is a list, not an object", "{ field: value, ... }"]),
        ("null", ["line 3: is null, not an object"]),
        ('{"prompt": "p", "target": "t"', ["line 3: is no valid JSON at column 30", "Repair the line"]),
        ('  {"prompt": "p" "target": "t"}', ["line 3: is no valid JSON at column 18 (expecting ',' delimiter)"]),
        (
            '{"prompt": "p", "target": "t"} {}',
            ["line 3: is no valid JSON at column 32 (text after the end of the row)"],
        ),
        ('{"prompt": "p", "target": "t", "target": "u"}', ['line 3, field "target": is given twice', "Keep one"]),
        ("[" * 100_000, ["line 3: is no valid JSON at column 1 (nested too deeply)"]),
        ('{"prompt": "p", "target": NaN}', ['line 3, field "target": is the number nan, not text. Give the new']),
    ],
)
def test_bad_line_is_named(line: str, substance: list[str], write: Write) -> None:
    # The blank line counts, so that the number is the one an editor shows.
    path = write(json.dumps(EDIT) + "\n\n" + line + "\n" + json.dumps(EDIT))
    message("edits", path, [*substance, "--data.on_bad_row skip"])
    assert [record.row for record in read_records("edits", path, on_bad_row="skip")] == [1, 4]


@pytest.mark.parametrize(
    ("text", "substance"),
    [
        ("[", ["at line 1, column 2 (expecting value, in element 1)", "cut short"]),
        ('[\n {"src": "s", "alt": "a"},\n {"src": "s"', ["at line 3, column 13", "in element 2)", "cut short"]),
        ('[\n {"src": "s", "alt": "a"}\n {}]', ["at line 3, column 2 (expected ',' or ']' after an element"]),
        ('[\n {"src": "s", "alt": "a"},\n]', ["at line 3, column 1 (expecting value, in element 2)"]),
        ('[{"src": "s", "alt": "a"}]\n]', ["at line 2, column 1 (text after the end of the array)"]),
        ("[ ]", ["holds no rows"]),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_broken_array_is_refused_whole(text: str, substance: list[str], on_bad_row: Any, write: Write) -> None:
    path = write(text, "a.json")
    message("zsre", path, substance)
    with pytest.raises(DataError):
        read_records("zsre", path, on_bad_row=on_bad_row)


@pytest.mark.parametrize(("array", "place"), [(True, "element 2 (line 9)"), (False, "line 2")])
def test_place_in_array_names_element_and_line(array: bool, place: str, write: Write) -> None:
    message("zsre", write([MEND, MEND | {"alt": ""}], array=array), [f'{place}, field "alt": is empty'])


def test_place_in_one_line_array_names_the_element_alone(write: Write) -> None:
    message("zsre", write(json.dumps([MEND, MEND | {"alt": ""}]) + "\n"), [', element 2, field "alt": is empty'])


@pytest.mark.parametrize(
    ("content", "substance"),
    [
        (b"", ["is empty", "in full"]),
        (b" \n\t\n", ["is empty"]),
        (b'{"prompt": "caf\xe9"}', ["is not UTF-8: byte 0xe9 at byte offset 15", "Save the file as UTF-8"]),
        (b"\x1f\x8b\x08", ["is not UTF-8: byte 0x8b at byte offset 1", "unpack"]),
        (
            '[{"prompt": "p", "target": "t"}]',
            ["is a JSON array, but this data set is JSONL", "one JSON object per line"],
        ),
    ],
)
def test_file_that_is_no_jsonl(content: Any, substance: list[str], write: Write) -> None:
    error = message("edits", write(content), substance)
    assert (error.row, error.field) == (None, None)


def test_missing_file_names_near_matches_and_where_paths_start(write: Write) -> None:
    write([EDIT], "edits-2024.jsonl")
    path = write([EDIT]).with_name("edits-2025.jsonl")
    message("edits", path, ["does not exist. Did you mean edits-2024.jsonl", f"starts at {Path.cwd()}"])
    message("edits", path.parent / "nowhere" / "e.jsonl", ["does not exist. Check the path."])


def test_directory_is_refused(tmp_path: Path) -> None:
    message("edits", tmp_path, ["is a directory. Give the path of one file"])
    with pytest.raises(DataError, match="is a directory"):
        file_checksum(tmp_path)


@pytest.mark.parametrize(
    ("error", "substance"),
    [
        (PermissionError(13, "Permission denied"), ["permission denied", "chmod u+r"]),
        (OSError(5, "Input/output error"), ["cannot be read (Input/output error)", "disk"]),
    ],
)
def test_unreadable_file(error: OSError, substance: list[str], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([EDIT])

    # Raised by hand: an administrator's account, as in many containers, may read everything.
    def refuse(self: Path) -> bytes:
        raise error

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message("edits", path, substance)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ('{"prompt": "p", "target": "a\u2028b"}\n{"prompt": "p", "target": "c\u0085d"}', ["a\u2028b", "c\u0085d"]),
        ('{"prompt": "p", "target": "a"}\r\n\r\n{"prompt": "p", "target": "b"}\r\n', ["a", "b"]),
        ('\ufeff{"prompt": "p", "target": "a"}', ["a"]),
        ('{"prompt": "p", "target": "Zu\\u00fcrg"}', ["Zuürg"]),
    ],
)
def test_line_ends_and_marks_of_other_systems(text: str, targets: list[str], write: Write) -> None:
    assert [record.target for record in read_records("edits", write(text))] == targets


def test_checksum_is_the_sha256_of_the_bytes(write: Write) -> None:
    content = bytes(range(256)) * 5000
    assert file_checksum(write(content)) == hashlib.sha256(content).hexdigest()
    assert file_checksum(write("")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
