"""``SettingsFile``: the settings of a run that was started from Python, beside what it writes."""

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from stableedit_pl.run.files.directory import RunDirectory
from stableedit_pl.run.files.plain import plain


class SettingsFile(Callback):
    """Writes ``config.yaml`` for a run started from Python; the command line saves its own."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write when the run starts or resumes; a run that fails before its first turn leaves no file behind."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not trainer.is_global_zero or any(isinstance(callback, SaveConfigCallback) for callback in callbacks):
            return
        run = RunDirectory(trainer.default_root_dir)
        settings = {
            "run_dir": str(run.path),
            "model": plain(dict(pl_module.hparams)),
            "data": plain(dict(trainer.datamodule.hparams)),  # type: ignore[attr-defined]
        }
        run.next_config().write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
