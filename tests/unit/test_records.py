"""The edit record refuses what is no text; the data error says where, what, and what to do."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableedit_pl.data.records import MAX_LISTED, DataError, EditRecord, Probe, Problem, kind_of, text_problem

EMPTY = Problem("is empty", "Give the new answer, or remove the row.", "target", 7, "line 7")


def test_record_needs_only_id_prompt_and_target() -> None:
    record = EditRecord("7", "The capital of Zubrowka is", "Lutz")
    assert (record.subject, record.rephrases, record.locality) == (None, (), ())
    assert (record.multi_hop, record.personas, record.row) == ((), (), 0)


def test_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EditRecord("7", "p", "t").target = "u"  # type: ignore[misc]


@pytest.mark.parametrize("text", [" leading", "trailing ", "nq question: who", "two\nlines", "🜚 ünï", "null", "0"])
def test_record_keeps_text_as_it_is(text: str) -> None:
    record = EditRecord("7", text, text, locality=(Probe(text, text),))
    assert (record.prompt, record.target, record.locality[0].target) == (text, text, text)


@pytest.mark.parametrize(
    ("changes", "substance"),
    [
        ({"target": ""}, ["edit '7', field \"target\"", "is empty", "Give a text."]),
        ({"target": " \t\n"}, ['"target"', "holds only white space"]),
        ({"target": None}, ['"target"', "is null, not text"]),
        ({"target": 1998}, ['"target"', "is the number 1998, not text", 'in quotes: "1998"']),
        ({"prompt": ["a"]}, ['"prompt"', "is a list, not text"]),
        ({"prompt": True}, ['"prompt"', "is true, not text"]),
        ({"id": ""}, ['"id"', "is empty"]),
        ({"subject": ""}, ['"subject"', "is empty"]),
        ({"rephrases": "abc"}, ['"rephrases"', "is text, not a tuple", "Give a tuple"]),
        ({"rephrases": ("ok", None)}, ['"rephrases"', "is null, not text"]),
        ({"personas": ["a"]}, ['"personas"', "is a list, not a tuple"]),
        ({"locality": (("p", "t"),)}, ['"locality"', "holds a tuple", "Probe"]),
        ({"multi_hop": ({"prompt": "p"},)}, ['"multi_hop"', "holds an object", "Probe"]),
    ],
)
def test_record_refuses_what_is_no_text(changes: dict[str, Any], substance: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        EditRecord(**({"id": "7", "prompt": "p", "target": "t"} | changes))
    assert all(part in str(caught.value) for part in substance), str(caught.value)


@pytest.mark.parametrize(("prompt", "target", "field"), [("", "t", "prompt"), ("p", None, "target")])
def test_probe_refuses_what_is_no_text(prompt: Any, target: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f'Probe, field "{field}"'):
        Probe(prompt, target)


@pytest.mark.parametrize(
    ("value", "problem", "remedy"),
    [
        ("a", None, None),
        ("null", None, None),
        ("", "is empty", ""),
        ("\u00a0", "holds only white space", ""),
        (None, "is null, not text", ""),
        (False, "is false, not text", ""),
        (0, "is the number 0, not text", 'Write it in quotes: "0".'),
        (float("nan"), "is the number nan, not text", ""),
        ({}, "is an object, not text", ""),
        ("ab\ud83d", "holds half a character (U+D83D at position 2)", "Repair the text or remove the row."),
    ],
)
def test_text_problem(value: object, problem: str | None, remedy: str | None) -> None:
    assert text_problem(value) == (None if problem is None else (problem, remedy))


@given(st.text())
def test_any_text_with_something_in_it_can_be_encoded(text: str) -> None:
    if text_problem(text) is None:
        assert text.strip()
        assert text.encode().decode() == text
    else:
        assert not text.strip()


@pytest.mark.parametrize(("value", "kind"), [(b"x", "a bytes"), ("x", "text"), (1.5, "the number 1.5"), (True, "true")])
def test_kind_of(value: object, kind: str) -> None:
    assert kind_of(value) == kind


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (EMPTY, 'edits.jsonl, line 7, field "target": is empty. Give the new answer, or remove the row.'),
        (Problem("is null", "Write a row.", None, 7, "line 7"), "edits.jsonl, line 7: is null. Write a row."),
        (Problem("is empty", "Check it."), "edits.jsonl: is empty. Check it."),
    ],
)
def test_one_problem_reads_as_one_sentence(problem: Problem, message: str) -> None:
    assert str(DataError("edits.jsonl", [problem])) == message


def test_error_carries_its_parts() -> None:
    error = DataError("edits.jsonl", [EMPTY, dataclasses.replace(EMPTY, row=9, place="line 9")])
    assert isinstance(error, ValueError)
    assert (error.path, error.row, error.field) == (Path("edits.jsonl"), 7, "target")
    assert (error.problem, error.remedy) == ("is empty", "Give the new answer, or remove the row.")
    assert [problem.row for problem in error.problems] == [7, 9]


@pytest.mark.parametrize(
    ("count", "listed", "rest"),
    [(2, 2, None), (MAX_LISTED, MAX_LISTED, None), (MAX_LISTED + 3, MAX_LISTED, "... and 3 more problems")],
)
def test_many_problems_are_listed_up_to_a_limit(count: int, listed: int, rest: str | None) -> None:
    problems = [Problem("is empty", "Fill it.", "target", row, f"line {row}") for row in range(1, count + 1)]
    lines = str(DataError("e.jsonl", problems, "A hint.")).splitlines()
    assert lines[0] == f"e.jsonl: {count} problems in {count} rows."
    assert lines[1] == '  line 1, field "target": is empty. Fill it.'
    assert sum("is empty" in line for line in lines) == listed
    assert lines[-1] == "A hint."
    assert (lines[-2].strip() == rest) if rest else ("more" not in lines[-2])


def test_two_problems_of_one_row_count_as_one_row() -> None:
    assert "2 problems in 1 row.\n" in str(DataError("e.jsonl", [EMPTY, dataclasses.replace(EMPTY, field="prompt")]))


def test_error_survives_the_way_between_processes() -> None:
    error = DataError("edits.jsonl", [EMPTY], "A hint.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems, copy.path) == (str(error), error.problems, error.path)
