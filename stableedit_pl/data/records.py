"""The edit record, and the error that says what is wrong with a data file.

Every reader turns its rows into `EditRecord`. Texts are kept character for character: no question mark is
appended, no prefix or surrounding space removed, so that a score can be traced back to the row as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_LISTED = 20
"""Problems spelled out in one message; a file of the wrong kind would otherwise print every row."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with the answer that is expected for it.

    Attributes:
        prompt: Text to complete.
        target: Expected answer, without a leading space of its own.

    Raises:
        ValueError: If either is not a text with something in it.
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        """Refuse what is no text."""
        _require_text("Probe", "prompt", self.prompt)
        _require_text("Probe", "target", self.target)


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One edit: after it, the model shall answer `prompt` with `target`.

    Attributes:
        id: Name of the edit, unique within its file.
        prompt: Prompt whose answer changes.
        target: New answer.
        subject: What the prompt is about, where the data set says so.
        rephrases: Other wordings of the prompt; they share the edit's target (generalization).
        locality: Unrelated prompts with the answers that must not change (specificity).
        multi_hop: Prompts whose answers follow from the edit.
        personas: The prompt in a persona's words; they share the edit's target.
        row: Where the record stands in its file, counted from 1: the line of a JSONL file, the element of a
            JSON array. 0 for a record that came from no file.

    Raises:
        ValueError: If a text is missing, empty or no text, or if a collection is no tuple.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    multi_hop: tuple[Probe, ...] = ()
    personas: tuple[str, ...] = ()
    row: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no text, and collections that are no tuples."""
        owner = f"edit {self.id!r}"
        for name in ("id", "prompt", "target"):
            _require_text(owner, name, getattr(self, name))
        if self.subject is not None:
            _require_text(owner, "subject", self.subject)
        for name in ("rephrases", "locality", "multi_hop", "personas"):
            values = getattr(self, name)
            # A bare string would pass as a sequence of one-letter prompts.
            if not isinstance(values, tuple):
                raise ValueError(f'{owner}, field "{name}": is {kind_of(values)}, not a tuple. Give a tuple.')
            for value in values:
                if name in ("rephrases", "personas"):
                    _require_text(owner, name, value)
                elif not isinstance(value, Probe):
                    raise ValueError(f'{owner}, field "{name}": holds {kind_of(value)}. Give Probe objects.')


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a file, a row or a field.

    Attributes:
        problem: What is wrong, as the end of a sentence that starts with the place.
        remedy: What to do about it, as whole sentences.
        field: Field of the row under its name in the file; None when it concerns the whole row or file.
        row: As `EditRecord.row`; None when it concerns the whole file.
        place: The row in words a person can follow, such as `line 7`.
    """

    problem: str
    remedy: str
    field: str | None = None
    row: int | None = None
    place: str = ""

    def __str__(self) -> str:
        """Say where, what, and what to do."""
        where = [self.place] if self.place else []
        if self.field is not None:
            where.append(f'field "{self.field}"')
        return (f"{', '.join(where)}: " if where else "") + f"{self.problem}. {self.remedy}"


class DataError(ValueError):
    """A data file cannot be read as it is.

    `row`, `field`, `problem` and `remedy` are those of the first problem; `problems` has all of them, also
    those that the message only counts.

    Args:
        path: File, as the user wrote it.
        problems: At least one problem, in file order.
        hint: A way forward that concerns the whole file, printed last.
    """

    def __init__(self, path: str | Path, problems: Sequence[Problem], hint: str = "") -> None:
        """See the class."""
        # All arguments go to the base class, which is what lets worker processes send the error on (pickle).
        super().__init__(path, problems, hint)
        self.path = Path(path)
        self.problems = tuple(problems)
        self.hint = hint
        first = self.problems[0]
        self.row, self.field, self.problem, self.remedy = first.row, first.field, first.problem, first.remedy

    def __str__(self) -> str:
        """Spell out the problems up to `MAX_LISTED`, each with its place and remedy."""
        if len(self.problems) == 1:
            only = self.problems[0]
            text = f"{self.path}{', ' if only.place or only.field else ': '}{only}"
        else:
            rows = len({problem.row for problem in self.problems})
            count = f"{len(self.problems)} problems in {rows} row{'s' if rows > 1 else ''}"
            text = f"{self.path}: {count}.\n{list_problems(self.problems)}"
        return f"{text}\n{self.hint}" if self.hint else text


def list_problems(problems: Sequence[Problem]) -> str:
    """Write problems one a line.

    Args:
        problems: Any number of problems.

    Returns:
        The first `MAX_LISTED` of them, then how many more there are.
    """
    lines = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  ... and {len(problems) - MAX_LISTED} more problems")
    return "\n".join(lines)


def kind_of(value: object) -> str:
    """Name the kind of a JSON value in words.

    Args:
        value: Any value.

    Returns:
        Such as `a list` or `the number 1998`.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    names = ((str, "text"), (list, "a list"), (dict, "an object"), (tuple, "a tuple"))
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def text_problem(value: object) -> tuple[str, str] | None:
    """Say why a value cannot serve as a prompt or an answer.

    Nothing is converted: `null` or a number would otherwise be taught as the word "null" or in a spelling that
    nobody chose.

    Args:
        value: Any value.

    Returns:
        None if it is a text with something in it, else the problem and, where it does not depend on the field,
        the remedy (else an empty string).
    """
    if not isinstance(value, str):
        # NaN is how some exporters write "no value"; in quotes it would be taught as a word.
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        return f"is {kind_of(value)}, not text", f'Write it in quotes: "{value}".' if number else ""
    if not value.strip():
        return ("holds only white space" if value else "is empty"), ""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            return f"holds half a character ({half} at position {error.start})", "Repair the text or remove the row."
    return None


def _require_text(owner: str, field: str, value: object) -> None:
    if problem := text_problem(value):
        raise ValueError(f'{owner}, field "{field}": {problem[0]}. {problem[1] or "Give a text."}')
