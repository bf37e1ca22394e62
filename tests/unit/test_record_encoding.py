"""Records to encodings: everything that scores an edit, and errors that name the place."""

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import word_tokenizer

from stableedit_pl.data import record_encoding
from stableedit_pl.data.record_encoding import RecordEncoder
from stableedit_pl.data.records import DataError, EditRecord, Probe, Problem
from stableedit_pl.model.encoding import Encoder, EncodingError

PATH = Path("data/edits.jsonl")
ENCODE = RecordEncoder(Encoder(word_tokenizer(), context_length=6), PATH)
LONG = "w1 w2 w3 w4 w5 w6 w7"


def record(row: int = 3, **changes: object) -> EditRecord:
    fields = {"id": "e7", "prompt": "w1 w2", "target": "w3", "row": row}
    return EditRecord(**(fields | changes))  # type: ignore[arg-type]


def test_the_edit_is_its_prompt_with_its_target() -> None:
    assert ENCODE(record()) == ENCODE.encoder.encode("w1 w2", "w3")


def test_everything_that_scores_an_edit_is_encoded() -> None:
    given = record(rephrases=("w4", "w5 w6"), locality=(Probe("w7", "w8"),))
    scored = ENCODE.scored(given)
    encode = ENCODE.encoder.encode
    assert scored.record is given and scored.efficacy == encode("w1 w2", "w3")
    assert scored.generalization == (encode("w4", "w3"), encode("w5 w6", "w3"))  # with the edit's own target
    assert scored.specificity == (encode("w7", "w8"),)  # with the probe's


def test_an_edit_without_other_prompts_has_none() -> None:
    scored = ENCODE.scored(record())
    assert scored.generalization == () and scored.specificity == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": LONG}, "prompt"),
        ({"rephrases": ("w4", LONG)}, "rephrases"),
        ({"locality": (Probe("w4", "w5"), Probe(LONG, "w5"))}, "locality"),
    ],
)
def test_errors_name_file_row_and_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(DataError) as raised:
        ENCODE.scored(record(**changes))
    error = raised.value
    assert (error.path, error.row, error.field) == (PATH, 3, field)
    assert str(error).startswith(f"{PATH}, row 3 (id 'e7'), field \"{field}\": ")
    assert "need 8 tokens, but the model's context is 6" in str(error) and "Shorten" in str(error)
    assert isinstance(error.__cause__, EncodingError)


class ScoresNothing(Encoder):
    """A tokenizer for which every target is nothing but a bare space."""

    def _is_bare_space(self, token: int) -> bool:
        return True


def test_a_target_without_tokens_is_blamed_on_the_target() -> None:
    with pytest.raises(DataError) as raised:
        RecordEncoder(ScoresNothing(word_tokenizer()), PATH).scored(record(rephrases=("w5",)))
    assert raised.value.field == "target" and "the target 'w3' tokenizes to nothing" in str(raised.value)


def test_check_lists_every_row_that_cannot_be_used_and_takes_the_rest() -> None:
    records = [
        record(1),
        record(2, prompt=LONG),
        record(3, rephrases=(LONG,)),
        record(4, locality=(Probe("w4", LONG),)),
    ]
    with pytest.raises(DataError) as raised:
        ENCODE.check(records)
    assert [problem.row for problem in raised.value.problems] == [2, 3, 4]
    assert [problem.field for problem in raised.value.problems] == ["prompt", "rephrases", "locality"]
    assert "3 problems in 3 rows" in str(raised.value)
    ENCODE.check(records[:1])
    ENCODE.check([])


def test_check_says_of_each_row_what_encoding_it_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with several faults too, of which the first counts; with pieces that end anywhere among the rows."""
    texts = ("w1", "w2 w3", LONG, "", "\n")
    records = [
        record(row, id=f"e{row}", prompt=prompt or "w9", rephrases=tuple(t for t in rephrases if t.strip()))
        for row, (prompt, *rephrases) in enumerate(itertools.product(texts[:3], texts, texts), start=1)
    ]
    expected: list[Problem] = []
    for each in records:
        try:
            ENCODE.scored(each)
        except DataError as error:
            expected += error.problems
    assert len(records) > len(expected) > 20
    for together in (1, 7, 1000):
        monkeypatch.setattr(record_encoding, "_CHECKED_TOGETHER", together)
        with pytest.raises(DataError) as raised:
            ENCODE.check(iter(records))
        assert list(raised.value.problems) == expected


def test_check_blames_a_target_without_tokens_on_the_target() -> None:
    with pytest.raises(DataError) as raised:
        RecordEncoder(ScoresNothing(word_tokenizer()), PATH).check([record(rephrases=("w5",))])
    assert raised.value.field == "target" and len(raised.value.problems) == 1


def test_check_goes_through_the_records_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stream is never held as tokens: when a piece is tokenized, the rows behind it are not even read."""
    monkeypatch.setattr(record_encoding, "_CHECKED_TOGETHER", 3)
    read: list[int] = []
    seen: list[tuple[int, int]] = []

    class Watched(Encoder):
        def refusals(self, pairs: Any) -> list[str | None]:
            seen.append((len(pairs), len(read)))
            return super().refusals(pairs)

    def rows() -> Iterator[EditRecord]:
        for row in range(1, 9):
            read.append(row)
            yield record(row)

    RecordEncoder(Watched(word_tokenizer()), PATH).check(rows())
    assert seen == [(3, 3), (3, 6), (2, 8)]


def test_errors_and_encoders_travel_between_processes() -> None:
    with pytest.raises(DataError) as raised:
        ENCODE(record(prompt=LONG))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert pickle.loads(pickle.dumps(ENCODE))(record()) == ENCODE(record())
