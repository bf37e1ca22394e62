"""Long streams for the demo model, made of the demo's own edits with other targets; used by the long measurements."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stableedit_pl.demo import demo_path

ANSWERS = 3
"""Targets that take turns at a prompt: its own and the next of other rows with the same question."""


def demo_rows() -> list[dict[str, Any]]:
    """The demo's target stream, as stored."""
    return [json.loads(line) for line in demo_path("edits.jsonl").read_text(encoding="utf-8").splitlines()]


def retargeted(count: int) -> Iterator[dict[str, Any]]:
    """So many edits: the demo's rows over and over; lap by lap each prompt moves on to the next of its three targets.

    Yields:
        Rows of the ``edits`` format, with ids that count from 0, and without prompts that score.
    """
    rows = demo_rows()
    questions = [row["prompt"].replace(row["subject"], "{}") for row in rows]
    targets: dict[str, list[str]] = {}
    place = []
    for row, question in zip(rows, questions, strict=True):
        place.append(len(targets.setdefault(question, [])))
        targets[question].append(row["target"])
    for i in range(count):
        lap, at = divmod(i, len(rows))
        row, choices = rows[at], targets[questions[at]]
        target = choices[(place[at] + lap % ANSWERS) % len(choices)]
        yield {"id": str(i), "prompt": row["prompt"], "target": target, "subject": row["subject"]}


def write_retargeted(count: int, file: Path) -> None:
    """Write :func:`retargeted` as a stream in the ``edits`` format."""
    with file.open("w", encoding="utf-8") as out:
        for row in retargeted(count):
            out.write(json.dumps(row) + "\n")
