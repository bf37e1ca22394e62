"""Text that edits are to leave alone, as encodings."""

from pathlib import Path

from stableedit_pl.data.readers import read_records
from stableedit_pl.data.record_encoding import RecordEncoder
from stableedit_pl.data.stream import EditStream
from stableedit_pl.errors import SettingError
from stableedit_pl.model.encoding import IGNORED, Encoder, Encoding

LONGEST = 256
"""Tokens of a line of plain text that are read."""


def ordinary_text(stream: EditStream, encoder: Encoder, path: str | None) -> list[Encoding]:
    """Encodings of a text; what they predict does not matter.

    Args:
        stream: whose layout rows have.
        encoder: of the model.
        path: ``.txt``, a text a line; else rows, whose prompts and locality prompts are taken, with their answers;
            None for the rows of the stream's warm-up.

    Raises:
        SettingError: if there is no such text.
    """
    file = text_file(stream, path)
    if file.suffix == ".txt":
        return _lines(file, encoder)
    row_encoder = RecordEncoder(encoder, file)
    records = read_records(stream.dataset, file, on_bad_row=stream.on_bad_row)
    row_encoder.check(records)
    scored = [row_encoder.scored(record) for record in records]
    return [encoding for record in scored for encoding in (record.efficacy, *record.specificity)]


def text_file(stream: EditStream, path: str | None) -> Path:
    """The file of the text.

    Raises:
        SettingError: if there is none.
    """
    if path is None and stream.warmup_path is None:
        raise SettingError(
            "ProtectedDirections needs text that is not edited: set its path to a .txt file (a text a line) or to "
            "rows, or set data.warmup_path, whose rows serve"
        )
    file = stream.warmup_file if path is None else Path(path).expanduser()
    if not file.is_file():
        raise SettingError(f"ProtectedDirections.path: there is no file {file}")
    return file


def _lines(file: Path, encoder: Encoder) -> list[Encoding]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    longest = min(LONGEST, encoder.context_length or LONGEST)
    found = []
    for line in lines:
        ids = encoder.text(line)[: longest + 1]
        if len(ids) > 2:
            found.append(Encoding(tuple(ids[:-1]), (*[IGNORED] * (len(ids) - 2), ids[-1]), len(ids) - 1))
    if not found:
        raise SettingError(f"ProtectedDirections.path: {file} has no line of text")
    return found
