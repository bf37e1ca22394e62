"""The run in TensorBoard: layout, settings, losses and cost; and no killed points after a resume."""

from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.run.curves import LAYOUT, log_curves, tensorboard_writers
from stableedit_pl.run.files.plain import plain


class RunCurves(Callback):
    """Writes every turn's losses and cost, the custom layout, and the settings as text.

    A resumed run marks its first turn in the event file, so that TensorBoard drops points of turns that a kill
    undid. A checkpoint is only written after all points up to it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """Lay out the page, or purge what a killed process logged beyond its checkpoint."""
        for writer in tensorboard_writers(trainer):
            turn = trainer.global_step
            if trainer.ckpt_path is not None:
                session = SessionLog(status=SessionLog.START)
                writer.file_writer.add_event(Event(session_log=session), step=turn + 1 if turn else 0)
            if turn == 0:
                writer.add_custom_scalars(LAYOUT)
                settings = {"model": dict(pl_module.hparams), "data": dict(trainer.datamodule.hparams)}  # type: ignore[attr-defined]
                writer.add_text("settings", "```yaml\n" + yaml.safe_dump(plain(settings), sort_keys=False) + "```", 0)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the turn."""
        report = pl_module.report
        assert report is not None
        edits = len(report.turn.edits)
        phase = "" if report.turn.phase == "edit" else "warmup_"
        log_curves(
            trainer,
            "editing",
            {
                f"{phase}loss_before": sum(report.losses_before) / edits,
                f"{phase}loss_after": sum(report.losses_after) / edits,
            },
        )
        for number, done in enumerate(report.step.passes, start=1):
            log_curves(
                trainer,
                "passes",
                {f"{phase}loss_{number}": done.loss, f"{phase}token_match_{number}": done.token_match},
            )
            log_curves(trainer, "cost", {f"seconds_pass_{number}": done.seconds})
        if report.step.passes:
            log_curves(trainer, "passes", {f"{phase}used": float(len(report.step.passes))})
        log_curves(trainer, "editing", {"rejected_turns": float(len(pl_module.state.rejected_turns))})
        seconds = {f"seconds_{part}": value for part, value in report.seconds.items()}
        log_curves(trainer, "cost", {**seconds, "edits_per_second": edits / max(report.edit_seconds, 1e-9)})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LifelongEditor, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """A checkpoint never knows of a turn whose points are not written."""
        for writer in tensorboard_writers(trainer):
            writer.flush()
