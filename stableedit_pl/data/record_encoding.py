"""Records to encodings, with errors that name file, row and field."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stableedit_pl.data.records import DataError, EditRecord, Problem
from stableedit_pl.model.encoding import EncodedPrompts, Encoder, Encoding, EncodingError, chunks

_CHECKED_TOGETHER = 1000
"""Rows whose texts are tokenized in one call: enough to hide what a call costs, and a few megabytes of tokens."""


@dataclass(frozen=True, slots=True)
class EncodedRecord(EncodedPrompts):
    """One edit with everything that scores it.

    Attributes:
        record: the edit.
    """

    record: EditRecord


class ScoredPiece:
    """A few edits that are scored together: what ``validation_step`` receives. Like a turn, no dataclass.

    Attributes:
        records: the edits.
    """

    def __init__(self, records: list[EncodedRecord]) -> None:
        """See the class."""
        self.records = records


@dataclass(frozen=True)
class RecordEncoder:
    """Encodes the records of one file.

    Args:
        encoder: for one tokenizer and model.
        path: the file, for error messages.
    """

    encoder: Encoder
    path: Path

    def __call__(self, record: EditRecord) -> Encoding:
        """Encode the edit itself: prompt and target.

        Raises:
            DataError: if it does not fit the model.
        """
        return self._encode(record, "prompt", record.prompt, record.target)

    def scored(self, record: EditRecord) -> EncodedRecord:
        """Encode the edit with all prompts that score it.

        Raises:
            DataError: if one of them does not fit the model.
        """
        return EncodedRecord(
            self(record),
            tuple(self._encode(record, "rephrases", text, record.target) for text in record.rephrases),
            tuple(self._encode(record, "locality", probe.prompt, probe.target) for probe in record.locality),
            record,
        )

    def check(self, records: Iterable[EditRecord]) -> None:
        """Tokenize every record once, so that a row the model cannot take is found before any weight is touched.

        Goes through the records piece by piece, and keeps no tokens.

        Raises:
            DataError: listing every such row, with what :meth:`scored` would say of it.
        """
        problems: list[Problem] = []
        for piece in chunks(records, _CHECKED_TOGETHER):
            prompts = [list(_prompts(record)) for record in piece]
            refusals = iter(self.encoder.refusals([(text, target) for texts in prompts for _, text, target in texts]))
            for record, texts in zip(piece, prompts, strict=True):
                found = [(field, refusal) for field, _, _ in texts if (refusal := next(refusals))]
                if found:
                    problems.append(_problem(record, *found[0]))
        if problems:
            raise DataError(self.path, problems)

    def _encode(self, record: EditRecord, field: str, prompt: str, target: str) -> Encoding:
        try:
            return self.encoder.encode(prompt, target)
        except EncodingError as error:
            raise DataError(self.path, [_problem(record, field, str(error))]) from error


def _prompts(record: EditRecord) -> Iterator[tuple[str, str, str]]:
    """Field, prompt and target of everything that :meth:`RecordEncoder.scored` encodes, in its order."""
    yield "prompt", record.prompt, record.target
    for text in record.rephrases:
        yield "rephrases", text, record.target
    for probe in record.locality:
        yield "locality", probe.prompt, probe.target


def _problem(record: EditRecord, field: str, refusal: str) -> Problem:
    about_target = refusal.startswith("the target") and field == "prompt"
    return Problem(
        problem=refusal,
        remedy="Shorten or correct the text, or remove the row.",
        field="target" if about_target else field,
        row=record.row,
        place=f"row {record.row} (id {record.id!r})",
    )
