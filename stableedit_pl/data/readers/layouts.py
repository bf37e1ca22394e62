"""Where each data set keeps what an edit record needs: one table of field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MISSING = object()
"""What `find` returns for a field that is not there; `None` is a JSON null."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a data set keeps what an edit record needs.

    Dots lead into nested objects. Rephrases, personas, locality and multi-hop prompts may be absent or null,
    since an edit can be applied without them; what they would measure is then not measured for that edit.

    Attributes:
        prompt: The edit prompt.
        target: The new answer; several names where the set exists in several versions.
        rephrases: Other wordings of the prompt.
        locality: Unrelated prompts and their answers, parallel; a single name is a list of prompt-target objects.
        multi_hop: As `locality`.
        personas: The prompt in a persona's words.
        subject: What the prompt is about.
        id: Name of the edit; a row without it is named after its number.
        is_template: Whether the prompt has one `{}` in place of the subject.
        shared_answer: Whether all locality prompts have the same answer.
        is_own: Whether it is this project's format: JSONL, lists where lists are meant, unknown fields refused.
    """

    prompt: str
    target: tuple[str, ...]
    rephrases: str
    locality: tuple[str, ...]
    multi_hop: tuple[str, ...] = ()
    personas: str = ""
    subject: str = ""
    id: str = ""
    is_template: bool = False
    shared_answer: bool = False
    is_own: bool = False

    def accepts(self, fields: Mapping[str, object]) -> bool:
        """Tell whether a row has the prompt and the target where this layout looks for them.

        Args:
            fields: The row.

        Returns:
            Whether both are there, whatever they hold.
        """
        return find(fields, self.prompt) is not MISSING and any(find(fields, t) is not MISSING for t in self.target)

    @property
    def names(self) -> set[str]:
        """First parts of the names of prompt and target."""
        return {name.partition(".")[0] for name in (self.prompt, *self.target)}

    def expected(self) -> dict[str, str]:
        """Name the fields without which a row is scored on less than the data set offers.

        Returns:
            What each field measures. Multi-hop prompts are left out: most rows have none.
        """
        fields = {self.rephrases: "generalization", self.locality[0]: "specificity", self.personas: "persona prompts"}
        return {field: measures for field, measures in fields.items() if field and not self.is_own}


LAYOUTS: Mapping[str, Layout] = {
    "edits": Layout(
        prompt="prompt",
        target=("target",),
        rephrases="rephrases",
        locality=("locality",),
        multi_hop=("multi_hop",),
        personas="personas",
        subject="subject",
        id="id",
        is_own=True,
    ),
    "zsre": Layout(  # the target is `alt` in MEND's files, `ans` in UltraEdit's
        prompt="src", target=("alt", "ans"), rephrases="rephrase", locality=("loc", "loc_ans"), subject="subject"
    ),
    "counterfact": Layout(
        prompt="requested_rewrite.prompt",
        target=("requested_rewrite.target_new.str",),
        rephrases="paraphrase_prompts",
        locality=("neighborhood_prompts", "requested_rewrite.target_true.str"),
        subject="requested_rewrite.subject",
        id="case_id",
        is_template=True,
        shared_answer=True,
    ),
    "fever": Layout(prompt="prompt", target=("alt",), rephrases="equiv_prompt", locality=("unrel_prompt", "unrel_ans")),
    "wikibigedit": Layout(
        prompt="update",
        target=("ans",),
        rephrases="rephrase",
        locality=("loc", "loc_ans"),
        multi_hop=("mhop", "mhop_ans"),
        personas="personas",
        subject="subject",
    ),
    "ultraeditbench": Layout(
        prompt="prompt", target=("ans",), rephrases="rephrase_prompt", locality=("loc", "loc_ans")
    ),
}


def find(fields: Mapping[str, object], name: str) -> object:
    """Look a field up.

    Args:
        fields: The row.
        name: Its name; dots lead into nested objects.

    Returns:
        Its value, or `MISSING`.
    """
    if "." not in name:  # nearly all are, and a long stream asks a dozen times a row
        return fields.get(name, MISSING)
    value: object = fields
    for part in name.split("."):
        value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
    return value


def is_absent(fields: Mapping[str, object], name: str) -> bool:
    """Tell whether a field is missing or null.

    Args:
        fields: The row.
        name: As for `find`.

    Returns:
        Whether there is nothing to read.
    """
    value = find(fields, name)
    return value is MISSING or value is None
