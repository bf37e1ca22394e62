"""Each data set's row becomes the same record, in each of its variants."""

from __future__ import annotations

from typing import Any

import pytest
from data_files import EDIT, Write

from stableedit_pl.data.readers import DATASETS, read_records
from stableedit_pl.data.records import DataError, EditRecord, Probe

MEND = {
    "subject": "Ostrelia",
    "src": "Who founded Ostrelia?",
    "pred": "Bo",
    "rephrase": "Ostrelia was founded by whom?",
    "alt": "Ada Quill",
    "answers": ["Bo"],
    "loc": "nq question: who wrote the long sea",
    "loc_ans": "Mira Voss",
    "cond": "Bo >> Ada Quill",
}
ULTRAEDIT = {key: MEND[key] for key in ("src", "rephrase", "loc", "loc_ans")} | {"ans": "Ada Quill"}
COUNTERFACT = {
    "case_id": 41,
    "requested_rewrite": {
        "prompt": "{} speaks {fluent}",
        "target_new": {"str": "Orcish", "id": "Q1"},
        "target_true": {"str": "Elvish", "id": "Q2"},
        "subject": "Tam Reed",
    },
    "paraphrase_prompts": ["Old note.\n Tam Reed speaks", "Tam Reed talks in"],
    "neighborhood_prompts": ["Ilo speaks", "Nan speaks"],
    "attribute_prompts": ["Grum speaks"],
    "generation_prompts": ["Tam Reed lives in"],
}
FEVER = {
    "prompt": "The moon of Vex is green.",
    "equiv_prompt": ["Vex has a green moon.", "Green is the moon of Vex."],
    "unrel_prompt": "Rivers are dry.",
    "alt": "REFUTES",
    "unrel_ans": "SUPPORTS",
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Vex FC",
    "update": "Who coaches Vex FC?",
    "rephrase": "Vex FC is coached by whom?",
    "ans": "Lia Stone",
    "personas": "Arr, who be coachin' Vex FC?",
    "loc": "Who coaches Nod FC?",
    "loc_ans": "Per Holt",
    "mhop": "Where was the coach of Vex FC born?",
    "mhop_ans": "Umber",
}
BENCH = {"prompt": "Vex lies in", "rephrase_prompt": "Vex is in", "ans": "Nod", "loc": "Ur lies in", "loc_ans": "Om"}
ROWS: dict[str, dict[str, Any]] = {
    "edits": EDIT,
    "zsre": MEND,
    "counterfact": COUNTERFACT,
    "fever": FEVER,
    "wikibigedit": WIKIBIGEDIT,
    "ultraeditbench": BENCH,
}
MEND_RECORD = EditRecord(
    "1",
    "Who founded Ostrelia?",
    "Ada Quill",
    "Ostrelia",
    ("Ostrelia was founded by whom?",),
    (Probe("nq question: who wrote the long sea", "Mira Voss"),),
    row=1,
)


@pytest.mark.parametrize(
    ("dataset", "row", "record"),
    [
        ("edits", EDIT, EditRecord("1", "The capital of Zubrowka is", "Lutz", row=1)),
        ("edits", EDIT | {"id": 7, "subject": None, "rephrases": None}, EditRecord("7", EDIT["prompt"], "Lutz", row=1)),
        (
            "edits",
            EDIT
            | {"id": "a", "subject": "Zubrowka", "rephrases": ["r1", "r2"], "personas": ["q"]}
            | {"locality": [{"prompt": "l", "target": "m"}], "multi_hop": [{"prompt": "h", "target": "i"}]},
            EditRecord(
                id="a",
                prompt=EDIT["prompt"],
                target="Lutz",
                subject="Zubrowka",
                rephrases=("r1", "r2"),
                locality=(Probe("l", "m"),),
                multi_hop=(Probe("h", "i"),),
                personas=("q",),
                row=1,
            ),
        ),
        ("zsre", MEND, MEND_RECORD),
        (
            "zsre",
            ULTRAEDIT,
            EditRecord("1", MEND_RECORD.prompt, "Ada Quill", None, MEND_RECORD.rephrases, MEND_RECORD.locality, row=1),
        ),
        ("zsre", MEND | {"ans": "Ada Quill"}, MEND_RECORD),
        (
            "counterfact",
            COUNTERFACT,
            EditRecord(
                "41",
                "Tam Reed speaks {fluent}",
                "Orcish",
                "Tam Reed",
                ("Old note.\n Tam Reed speaks", "Tam Reed talks in"),
                (Probe("Ilo speaks", "Elvish"), Probe("Nan speaks", "Elvish")),
                row=1,
            ),
        ),
        (
            "fever",
            FEVER,
            EditRecord(
                "1",
                "The moon of Vex is green.",
                "REFUTES",
                None,
                ("Vex has a green moon.", "Green is the moon of Vex."),
                (Probe("Rivers are dry.", "SUPPORTS"),),
                row=1,
            ),
        ),
        (
            "wikibigedit",
            WIKIBIGEDIT,
            EditRecord(
                "1",
                "Who coaches Vex FC?",
                "Lia Stone",
                "Vex FC",
                ("Vex FC is coached by whom?",),
                (Probe("Who coaches Nod FC?", "Per Holt"),),
                (Probe("Where was the coach of Vex FC born?", "Umber"),),
                ("Arr, who be coachin' Vex FC?",),
                1,
            ),
        ),
        (
            "ultraeditbench",
            BENCH,
            EditRecord("1", "Vex lies in", "Nod", None, ("Vex is in",), (Probe("Ur lies in", "Om"),), row=1),
        ),
    ],
)
def test_row_becomes_record(dataset: str, row: dict[str, Any], record: EditRecord, write: Write) -> None:
    assert read_records(dataset, write([row])) == [record]


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "edits"])
def test_array_and_jsonl_read_alike(dataset: str, write: Write) -> None:
    rows = [ROWS[dataset], ROWS[dataset] | ({"case_id": 42} if dataset == "counterfact" else {})]
    as_array = read_records(dataset, write(rows, "a.json", array=True))
    assert as_array == read_records(dataset, write(rows, "a.jsonl"))
    assert [record.row for record in as_array] == [1, 2]


@pytest.mark.parametrize(
    ("dataset", "changes", "name", "value"),
    [
        ("fever", {"equiv_prompt": "one"}, "rephrases", ("one",)),
        ("fever", {"equiv_prompt": []}, "rephrases", ()),
        ("zsre", {"rephrase": ["one", "two"]}, "rephrases", ("one", "two")),
        ("zsre", {"loc": ["a", "b"], "loc_ans": ["c", "d"]}, "locality", (Probe("a", "c"), Probe("b", "d"))),
        ("zsre", {"alt": " Ada Quill"}, "target", " Ada Quill"),
        ("wikibigedit", {"mhop": None, "mhop_ans": None}, "multi_hop", ()),
        ("wikibigedit", {"mhop": None}, "multi_hop", ()),
        ("wikibigedit", {"personas": ["p", "q"]}, "personas", ("p", "q")),
        ("counterfact", {"neighborhood_prompts": []}, "locality", ()),
        ("counterfact", {"case_id": "x"}, "id", "x"),
    ],
)
def test_variants_of_a_field(dataset: str, changes: dict[str, Any], name: str, value: Any, write: Write) -> None:
    (record,) = read_records(dataset, write([ROWS[dataset] | changes]))
    assert getattr(record, name) == value


@pytest.mark.parametrize("actual", DATASETS)
@pytest.mark.parametrize("asked", DATASETS)
def test_wrong_dataset_is_recognized(asked: str, actual: str, write: Write) -> None:
    path = write([ROWS[actual]])
    if asked == actual:
        assert len(read_records(asked, path)) == 1
    else:
        with pytest.raises(DataError, match=f'these look like rows of the data set "{actual}"'):
            read_records(asked, path)


@pytest.mark.parametrize("dataset", DATASETS)
def test_complete_rows_are_read_without_a_word(dataset: str, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    read_records(dataset, write([ROWS[dataset]]))
    assert caplog.records == []
