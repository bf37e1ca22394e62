"""``edits.jsonl``: one line per applied edit, in order."""

import json
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.report import TurnReport
from stableedit_pl.run_directory import RunDirectory, flush_to_disk


class EditLedger(Callback):
    """Writes each committed turn's edits to ``edits.jsonl`` in the run directory.

    A line has ``id``, ``turn`` (0-based), ``phase``, ``loss_before`` and ``loss_after`` (cross entropy in nats, summed
    over the answer tokens), ``known_before`` (the model already gave the target: the edit is a no-op) and
    ``at_edit`` (score right after the turn; null where the weights were left alone).

    A resumed run first drops the lines of turns that its checkpoint does not have; they are applied again.
    """

    def __init__(self) -> None:
        """No settings."""
        self._file: IO[str] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the ledger at the committed turn.

        Raises:
            RuntimeError: if it has no line for a turn that the checkpoint has.
        """
        if not trainer.is_global_zero:
            return
        path = RunDirectory(trainer.default_root_dir).ledger
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, trainer.global_step)
        self._file = path.open("a", encoding="utf-8")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the turn's lines."""
        if self._file is not None and pl_module.report is not None:
            self._file.writelines(
                json.dumps(line, ensure_ascii=False) + "\n" for line in ledger_lines(pl_module.report)
            )
            self._file.flush()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint never knows of a turn whose lines are not on disk."""
        if self._file is not None:
            flush_to_disk(self._file.fileno())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def ledger_lines(report: TurnReport) -> list[dict[str, Any]]:
    """A turn's lines, in the order of its edits."""
    return [
        {
            "id": edit.record.id,
            "turn": report.turn.index,
            "phase": report.turn.phase,
            "loss_before": report.losses_before[i],
            "loss_after": report.losses_after[i],
            "known_before": report.known_before[i],
            "at_edit": None if report.at_edit is None else report.at_edit[i],
        }
        for i, edit in enumerate(report.turn.edits)
    ]


def _cut(path: Path, committed_turns: int) -> None:
    """Keep the lines of the first ``committed_turns`` turns.

    A line that does not parse can only be the last, half written when the process was killed.
    """
    if committed_turns == 0:
        path.write_text("", encoding="utf-8")
        return
    end, last_turn = 0, -1
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                turn = json.loads(line)["turn"]
            except ValueError:
                break
            if turn >= committed_turns:
                break
            end, last_turn = end + len(line), turn
    if last_turn != committed_turns - 1:
        state = f"ends at turn {last_turn}" if path.exists() else "is missing"
        raise RuntimeError(
            f"{path} {state}, but the checkpoint has {committed_turns} committed turns (the last is turn "
            f"{committed_turns - 1}): put back the run's own edits.jsonl, or start a new run"
        )
    with path.open("r+b") as writable:
        writable.truncate(end)
