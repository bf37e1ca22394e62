"""Every way a field can be wrong is said with its place, its name and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from data_files import EDIT, MEND, Write, message

COUNTERFACT = {
    "case_id": 41,
    "requested_rewrite": {
        "prompt": "{} speaks",
        "target_new": {"str": "Orcish"},
        "target_true": {"str": "Elvish"},
        "subject": "Tam Reed",
    },
    "neighborhood_prompts": ["Ilo speaks"],
}
FEVER = {
    "prompt": "The moon of Vex is green.",
    "equiv_prompt": ["r"],
    "unrel_prompt": "l",
    "alt": "no",
    "unrel_ans": "m",
}
WIKIBIGEDIT = {"update": "Who coaches Vex FC?", "ans": "Lia Stone", "mhop": "Where was she born?", "mhop_ans": "Umber"}
BENCH = {"prompt": "Vex lies in", "rephrase_prompt": "Vex is in", "ans": "Nod", "loc": "Ur lies in", "loc_ans": "Om"}
ROWS: dict[str, dict[str, Any]] = {
    "edits": EDIT,
    "zsre": MEND,
    "counterfact": COUNTERFACT,
    "fever": FEVER,
    "wikibigedit": WIKIBIGEDIT,
    "ultraeditbench": BENCH,
}


@pytest.mark.parametrize(
    ("dataset", "row", "substance"),
    [
        ("edits", EDIT | {"target": ""}, ['"target": is empty. Give the new answer, or remove the row.']),
        ("edits", EDIT | {"target": " \t"}, ['"target": holds only white space', "new answer"]),
        ("edits", EDIT | {"target": None}, ['"target": is null, not text', "new answer"]),
        ("edits", EDIT | {"target": 1998}, ['"target": is the number 1998, not text', 'in quotes: "1998"']),
        ("edits", {"prompt": "p"}, ['"target": is missing', "new answer"]),
        ("edits", {"target": "t"}, ['"prompt": is missing', "Give the prompt"]),
        ("edits", EDIT | {"prompt": ["p"]}, ['"prompt": is a list, not text']),
        ("edits", EDIT | {"prompt": "a\ud83d"}, ['"prompt": holds half a character (U+D83D']),
        ("edits", EDIT | {"id": 1.5}, ['"id": is the number 1.5, not text']),
        ("edits", EDIT | {"id": None}, ['"id": is null', "leave the field out"]),
        (
            "edits",
            EDIT | {"rephrase": ["r"]},
            ['"rephrase": is unknown. Did you mean "rephrases"?', "Known fields: pro"],
        ),
        ("edits", EDIT | {"zzz": 1}, ['"zzz": is unknown. Known fields: prompt, target, id, subject']),
        ("edits", {"promt": "p", "target": "t"}, ['"promt": is unknown', '"prompt": is missing. Is it', '"promt"?']),
        ("edits", EDIT | {"rephrases": "r"}, ['"rephrases": is text, not a list. Write a list of texts: ["..."]']),
        ("edits", EDIT | {"rephrases": ["r", ""]}, ['"rephrases[1]": is empty']),
        ("edits", EDIT | {"personas": {}}, ['"personas": is an object, not a list']),
        ("edits", EDIT | {"locality": {}}, ['"locality": is an object, not a list. Write [{"prompt"']),
        ("edits", EDIT | {"locality": ["l"]}, ['"locality[0]": is text, not an object. Write {"prompt"']),
        ("edits", EDIT | {"locality": [{"prompt": "l"}]}, ['"locality[0].target": is missing', "remove the pair"]),
        (
            "edits",
            EDIT | {"multi_hop": [{"prompt": "l", "target": None, "targets": "x"}]},
            ['"multi_hop[0].target": is null', '"multi_hop[0].targets": is unknown. Did you mean "target"?'],
        ),
        ("zsre", MEND | {"alt": ""}, ['"alt": is empty. Give the new answer, or remove the row.']),
        ("zsre", {"src": "s"}, ['"alt": is missing (so is "ans", its name in other versions). Give the new answer']),
        ("zsre", MEND | {"ans": "Bo"}, ['"alt": differs from "ans". Either may be meant']),
        ("zsre", MEND | {"loc_ans": None}, ['"loc_ans": is null, not text. Give the answer']),
        ("zsre", MEND | {"loc": ["a", "b"]}, ['"loc_ans": counts 1 for 2 in "loc". Give one answer for each']),
        ("zsre", MEND | {"subject": 3}, ['"subject": is the number 3, not text']),
        ("fever", FEVER | {"equiv_prompt": [None]}, ['"equiv_prompt[0]": is null, not text']),
        ("wikibigedit", WIKIBIGEDIT | {"mhop_ans": None}, ['"mhop_ans": is null, not text. Give the answer']),
        ("ultraeditbench", {"prompt": "p", "ans": "a", "loc_ans": "x"}, ['"loc": is missing beside "loc_ans"']),
        (
            "counterfact",
            COUNTERFACT | {"requested_rewrite": {"prompt": "{} is {}", "subject": "s", "target_new": "flat"}},
            [
                '"requested_rewrite.target_new.str": is missing',
                '"requested_rewrite.prompt": has 2 places "{}" for the subject. Write the prompt with exactly one',
                '"requested_rewrite.target_true.str": is missing. Give the answer',
            ],
        ),
    ],
)
def test_bad_field_is_named(dataset: str, row: dict[str, Any], substance: list[str], write: Write) -> None:
    good = ROWS[dataset] | ({"case_id": 1} if dataset == "counterfact" else {})
    error = message(dataset, write([good, row]), ["line 2, field ", *substance])
    assert {problem.row for problem in error.problems} == {2}


@pytest.mark.parametrize(
    ("dataset", "rows", "substance"),
    [
        (
            "edits",
            [EDIT | {"id": "a"}, EDIT, EDIT | {"id": "a"}],
            'line 3, field "id": "a" is already the id of line 1',
        ),
        ("edits", [EDIT | {"id": 7}, EDIT | {"id": "7"}], 'line 2, field "id": "7" is already the id of line 1'),
        ("edits", [EDIT | {"id": "2"}, EDIT], 'line 2, field "id": "2" is already the id of line 1'),
        ("counterfact", [COUNTERFACT, COUNTERFACT], 'line 2, field "case_id": "41" is already the id of line 1'),
    ],
)
def test_duplicate_ids_are_refused(dataset: str, rows: list[Any], substance: str, write: Write) -> None:
    message(dataset, write(rows), [substance, "an id of its own"])
