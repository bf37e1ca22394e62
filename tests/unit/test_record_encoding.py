"""Records to encodings: everything that scores an edit, and errors that name the place."""

import pickle
from pathlib import Path

import pytest
from tiny import word_tokenizer

from stableedit_pl.encoding import Encoder, EncodingError
from stableedit_pl.record_encoding import RecordEncoder
from stableedit_pl.records import DataError, EditRecord, Probe

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


def test_errors_and_encoders_travel_between_processes() -> None:
    with pytest.raises(DataError) as raised:
        ENCODE(record(prompt=LONG))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert pickle.loads(pickle.dumps(ENCODE))(record()) == ENCODE(record())
