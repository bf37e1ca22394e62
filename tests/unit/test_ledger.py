"""The chained JSONL file: appending, cutting at a position, and finding what was changed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableedit_pl.run.files.ledger import Ledger, LedgerError, Position, chained, read_ledger

ENTRIES = [{"id": f"é{i}", "turn": i // 2, "loss": 0.1 * i} for i in range(6)]


def written(path: Path) -> list[Position]:
    """A ledger of six entries; the position after each."""
    ledger, positions = Ledger(path, Position()), []
    for entry in ENTRIES:
        ledger.append([entry])
        positions.append(ledger.position)
    ledger.close()
    return positions


def test_what_is_appended_is_read_with_its_position(tmp_path: Path) -> None:
    positions = written(tmp_path / "l.jsonl")
    read = list(read_ledger(tmp_path / "l.jsonl"))
    assert [position for _, position in read] == positions
    assert [{k: v for k, v in entry.items() if k != "hash"} for entry, _ in read] == ENTRIES
    assert positions[-1].size == (tmp_path / "l.jsonl").stat().st_size


@pytest.mark.parametrize("keep", range(7))
@pytest.mark.parametrize("tail", ["", '{"id": "half'])
def test_a_ledger_is_cut_at_its_position_and_goes_on_alike(tmp_path: Path, keep: int, tail: str) -> None:
    positions = [Position(), *written(tmp_path / "whole.jsonl")]
    path = tmp_path / "l.jsonl"
    path.write_text((tmp_path / "whole.jsonl").read_text() + tail)
    ledger = Ledger(path, positions[keep])
    ledger.append(ENTRIES[keep:])
    ledger.close()
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


@given(line=st.integers(0, 5), change=st.sampled_from(["value", "drop", "double", "swap", "hash"]))
def test_any_change_breaks_the_chain(tmp_path_factory: pytest.TempPathFactory, line: int, change: str) -> None:
    path = tmp_path_factory.mktemp("ledger") / "l.jsonl"
    written(path)
    lines = path.read_text().splitlines()
    entry = json.loads(lines[line])
    if change == "value":
        lines[line] = json.dumps({**entry, "loss": 7.5}, ensure_ascii=False)
    elif change == "hash":
        lines[line] = json.dumps({**entry, "hash": "0" * 32}, ensure_ascii=False)
    elif change == "double":
        lines.insert(line, lines[line])
    elif change == "swap":
        lines[line], lines[(line + 1) % 6] = lines[(line + 1) % 6], lines[line]
    else:
        if line == 5:
            return  # nothing after it: only the checkpoint's position can tell
        del lines[line]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=r"line \d: its hash does not follow"):
        list(read_ledger(path))


def test_another_file_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    positions = written(tmp_path / "l.jsonl")
    with pytest.raises(LedgerError, match="the checkpoint knows 6 lines in"):
        (tmp_path / "short.jsonl").write_text("{}\n")
        Ledger(tmp_path / "short.jsonl", positions[-1])
    content = (tmp_path / "l.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(content.replace(positions[2].hash, "f" * 32))
    with pytest.raises(LedgerError, match="line 3 is not the one"):
        Ledger(tmp_path / "other.jsonl", positions[2])
    assert (tmp_path / "other.jsonl").read_text().count("\n") == 6, "a refused file is not cut"


def test_lines_that_are_no_entries_are_named(tmp_path: Path) -> None:
    written(tmp_path / "l.jsonl")
    for wrong in ("nonsense", "[1]", '{"id": 1}'):
        (tmp_path / "w.jsonl").write_text((tmp_path / "l.jsonl").read_text() + wrong + "\n")
        with pytest.raises(LedgerError, match="line 7: is no entry of a ledger"):
            list(read_ledger(tmp_path / "w.jsonl"))


def test_the_hash_is_of_the_content_and_of_all_before() -> None:
    assert chained("", {"a": 1}) == chained("", {"a": 1, "hash": "x"})
    assert chained("", {"a": 1}) != chained("0", {"a": 1})
    assert chained("", {"a": 1}) != chained("", {"a": 2})
    assert len(chained("", {})) == 32


def test_a_line_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    """Beside a living run, or after a kill."""
    path = tmp_path / "l.jsonl"
    positions = written(path)
    with path.open("a") as file:
        file.write('{"id": "half')
    assert [position for _, position in read_ledger(path)][-1] == positions[-1]
