"""``edits.jsonl``: one line per applied edit, in order; ``rejected.jsonl``: those of turns that were rejected."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.method.scales import plain_scales
from stableedit_pl.run.files.directory import RunDirectory
from stableedit_pl.run.files.ledger import Ledger, Position
from stableedit_pl.run.report import TurnReport


class EditLedger(Callback):
    """Writes each committed turn's edits to ``edits.jsonl`` in the run directory.

    A line has ``id``, ``turn`` (0-based), ``phase``, ``loss_before`` and ``loss_after`` (cross entropy in nats, summed
    over the answer tokens), ``known_before`` (the model already gave the target: the edit is a no-op), ``at_edit``
    (score right after the turn; null where the weights were left alone), ``passes`` (how often the turn looked at its
    edits; 0 where the weights were left alone) and ``hash`` (running, see ``stableedit_pl.run.files.ledger``). The
    first line of a turn that made relative settings absolute for good has these as ``scales``. Edits of a rejected turn
    go to ``rejected.jsonl`` instead, with the ``reason``.

    A resumed run first drops the lines of turns that its checkpoint does not have; they are applied again.
    """

    def __init__(self) -> None:
        """No settings."""
        self._positions = {"edits": Position(), "rejected": Position()}
        self._ledgers: dict[str, Ledger] = {}

    def state_dict(self) -> dict[str, Any]:
        """How far both files go."""
        return {name: ledger.state() for name, ledger in self._ledgers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how far both files went."""
        self._positions = {name: Position(**state) for name, state in state_dict.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files at the committed turn.

        Raises:
            LedgerError: if they are not those that the checkpoint knows.
        """
        if trainer.is_global_zero:
            run = RunDirectory(trainer.default_root_dir)
            files = {"edits": run.ledger, "rejected": run.rejected}
            self._ledgers = {name: Ledger(path, self._positions[name]) for name, path in files.items()}

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the turn's lines."""
        report = pl_module.report
        if self._ledgers and report is not None:
            if report.rejected is None:
                self._ledgers["edits"].append(ledger_lines(report))
            else:
                self._ledgers["rejected"].append(rejected_lines(report))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint never knows of a turn whose lines are not on disk."""
        for ledger in self._ledgers.values():
            ledger.sync()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the files."""
        for ledger in self._ledgers.values():
            ledger.close()
        self._ledgers = {}


def ledger_lines(report: TurnReport) -> list[dict[str, Any]]:
    """A turn's lines, in the order of its edits."""
    scales = plain_scales(report.step.plan.kept_scales)
    return [
        {
            "id": edit.record.id,
            "turn": report.turn.index,
            "phase": report.turn.phase,
            "loss_before": report.losses_before[i],
            "loss_after": report.losses_after[i],
            "known_before": report.known_before[i],
            "at_edit": None if report.at_edit is None else report.at_edit[i],
            "passes": len(report.step.passes),
            **({"scales": scales} if scales and i == 0 else {}),
        }
        for i, edit in enumerate(report.turn.edits)
    ]


def rejected_lines(report: TurnReport) -> list[dict[str, Any]]:
    """A rejected turn's lines, in the order of its edits."""
    return [
        {"id": edit.record.id, "turn": report.turn.index, "phase": report.turn.phase, "reason": report.rejected}
        for edit in report.turn.edits
    ]
