"""Callbacks of ``soak.py``: a line per turn with its cost, and scores of the facts that hold at the time."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from long_stream import demo_rows
from measuring import resident_megabytes

from stableedit_pl.callbacks import TurnCheckpoint
from stableedit_pl.data.records import EditRecord, Probe

LOG = "soak.jsonl"
FACTS = len(demo_rows())


class CurrentFacts(Callback):
    """Scores the newest edit of every prompt, with the demo's rephrasings and unrelated prompts."""

    def __init__(self, every_n_turns: int) -> None:
        """Score after every so many turns."""
        self.every_n_turns = every_n_turns
        self.rows = demo_rows()
        self.base: list[Any] = []

    def _records(self, trainer: Any, applied: int) -> list[Any]:
        stream = trainer.datamodule
        records = []
        for edit in stream.target[max(applied - FACTS, 0) : applied]:
            row = self.rows[int(edit.id) % FACTS]
            locality = tuple(Probe(probe["prompt"], probe["target"]) for probe in row["locality"])
            record = EditRecord(edit.id, edit.prompt, edit.target, rephrases=tuple(row["rephrases"]), locality=locality)
            records.append(stream.target_encoder.scored(record))
        return records

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the base model's answers, in the order of the demo's rows."""
        with pl_module.base_weights():
            self.base = pl_module.answer(self._records(trainer, FACTS))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Score when due."""
        pl_module.soak_scores = {}
        applied = len(trainer.datamodule.applied_rows(trainer.global_step, []))
        if trainer.global_step % self.every_n_turns or applied < FACTS:
            return
        records = self._records(trainer, applied)
        base = [self.base[int(record.record.id) % FACTS] for record in records]
        scores = pl_module.compare(records, pl_module.answer(records), base)
        kinds = zip(*scores, strict=True)
        pl_module.soak_scores = {
            kind: sum(values) / len(values)
            for kind, values in zip(("efficacy", "generalization", "specificity"), kinds, strict=True)
        }


class WatchedCheckpoint(TurnCheckpoint):
    """Saves as always; times it, and writes the turn's line. Comes last in a turn, so that the line has all of it."""

    def __init__(self, every_n_turns: int) -> None:
        """See the base class."""
        super().__init__(every_n_turns=every_n_turns)
        self.ended: float | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time to, and write the line."""
        started = time.perf_counter()
        due = self._due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now = time.perf_counter()
        line = {
            "turn": trainer.global_step,
            "phase": batch.phase,
            "applied": len(batch.edits),
            "edits": len(trainer.datamodule.applied_rows(trainer.global_step, [])),
            # The first turn of a process has no turn before it to count from.
            "seconds": None if self.ended is None else now - self.ended,
            "checkpoint_seconds": now - started if due else None,
            "megabytes": resident_megabytes(),
            **pl_module.soak_scores,
        }
        with (Path(trainer.default_root_dir) / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.ended = now
