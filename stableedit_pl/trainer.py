"""``EditTrainer``: Lightning's Trainer with a run directory and the defaults of an edit stream."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn

from stableedit_pl.callbacks import (
    EditEvaluation,
    EditLedger,
    ProtectedDirections,
    RankAgreement,
    RunAdvice,
    RunCurves,
    StatisticsCheckpoint,
    TurnCheckpoint,
    TurnProgress,
)
from stableedit_pl.callbacks.run_opening import RunOpening
from stableedit_pl.callbacks.settings_file import SettingsFile
from stableedit_pl.data.stream import EditStream
from stableedit_pl.devices import ranks
from stableedit_pl.devices.sharded_strategy import strategies_of_a_stream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.model.scoring import KINDS
from stableedit_pl.run.files.checkpoint_io import AtomicCheckpointIO
from stableedit_pl.run.files.directory import ASK, FORK, LAST, RunDirectory, RunDirectoryError
from stableedit_pl.run.files.opening import Opening
from stableedit_pl.run.guards import check_trainer
from stableedit_pl.tune.outcome import TuneResult
from stableedit_pl.tune.tuner import TuneRule, tune


class EditTrainer(Trainer):
    """Runs edit streams; everything a run writes lies in ``run_dir``.

    Unless given otherwise it logs to TensorBoard, keeps a ledger, saves completed turns and the LN statistics,
    evaluates, and shows a progress bar in turns.

    Args:
        run_dir: directory of the run.
        overwrite: replace a run that is already in ``run_dir``.
        fork_from: run directory, or checkpoint, whose weights and statistics a new run starts with; its position,
            ledger and scores stay behind. Ignored when a run is resumed.
        max_epochs: 1; a stream is passed once.
        logger: a logger or several; true or null for TensorBoard in ``run_dir``, false for none.
        callbacks: added to the defaults; one of a default's class replaces it.
        plugins: as in Lightning's Trainer.
        devices: processes on this machine, a device each, that share every turn; likewise ``num_nodes``.
        strategy: for several processes, ``ddp`` (or ``auto``), where each holds the whole model, or ``sharded``, where
            they divide its weights (``ShardedStrategy`` has the sizes).
        rank_timeout: seconds that processes wait for one another before the run stops; a strategy that is given with
            arguments of its own has its own.
        num_sanity_val_steps: 0; there is no validation loop during an edit run.
        enable_model_summary: list the model's layers before the run.
        use_distributed_sampler: false; a stream is never shuffled or split.
        enable_progress_bar: show turns, edits per second and live efficacy.
        enable_checkpointing: save completed turns, and stop cleanly on Ctrl-C and SIGTERM.
        enable_autolog_hparams: false; hparams are logged with the final scores.
        log_every_n_steps: turns between Lightning's own log points; the curves here have one per turn.
        kwargs: everything else of Lightning's Trainer.
    """

    callbacks: list[Callback]

    def __init__(
        self,
        *,
        run_dir: str = "runs/default",
        overwrite: bool = False,
        fork_from: str | None = None,
        max_epochs: int | None = 1,
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        plugins: Any = None,
        devices: list[int] | str | int = 1,
        strategy: str | Strategy = "auto",
        rank_timeout: float = 600.0,
        num_sanity_val_steps: int | None = 0,
        enable_model_summary: bool | None = False,
        use_distributed_sampler: bool = False,
        enable_progress_bar: bool | None = True,
        enable_checkpointing: bool | None = True,
        enable_autolog_hparams: bool = False,
        log_every_n_steps: int | None = 1,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        if kwargs.get("barebones"):
            raise SettingError(
                "trainer.barebones would leave out checkpoints and curves, which are the run; for speed set "
                "trainer.enable_progress_bar and trainer.logger to false, and EditEvaluation.every_n_turns to null"
            )
        if not str(run_dir):
            raise SettingError("run_dir is empty: give the directory in which everything of the run shall lie")
        self.run_directory = RunDirectory(run_dir)
        self.overwrite = overwrite
        self.fork_from = fork_from
        if logger is None or logger is True:
            logger = TensorBoardLogger(str(self.run_directory.path), name="", version="", default_hp_metric=False)
        given = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
        if not rank_timeout > 0:
            raise SettingError(f"trainer.rank_timeout must be positive, got {rank_timeout}")
        with strategies_of_a_stream(rank_timeout):
            super().__init__(
                default_root_dir=str(self.run_directory.path),
                max_epochs=max_epochs,
                logger=logger,
                callbacks=self._with_defaults(
                    given, enable_progress_bar is not False, enable_checkpointing is not False
                ),
                plugins=_with_checkpoint_io(plugins),
                devices=devices,
                strategy=strategy,
                num_sanity_val_steps=num_sanity_val_steps,
                enable_model_summary=enable_model_summary,
                use_distributed_sampler=use_distributed_sampler,
                enable_progress_bar=enable_progress_bar,
                enable_checkpointing=enable_checkpointing,
                enable_autolog_hparams=enable_autolog_hparams,
                log_every_n_steps=log_every_n_steps,
                **kwargs,
            )

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Apply a stream of edits to a model.

        Args:
            model: a LifelongEditor.
            train_dataloaders: not used; an EditStream is given as ``datamodule`` (or in this place).
            val_dataloaders: not used; the EditEvaluation callback evaluates.
            datamodule: an EditStream.
            ckpt_path: ``last`` to resume the run in ``run_dir``, or one of its checkpoints.
            weights_only: always true; loading a checkpoint never executes code.

        Raises:
            RunDirectoryError: if ``run_dir`` holds another run, none to resume, or one that is still running.
            MisconfigurationException: if a setting or callback would break the stream.
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        check_trainer(self)
        with self._opening() as opening:
            checkpoint = None if opening is None else opening.checkpoint(ckpt_path)
            if opening is not None and isinstance(model, LifelongEditor):
                fork = self.fork_from if checkpoint is None else None
                model.start_from = None if fork is None else self._fork_source(Path(fork).expanduser())
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, checkpoint, weights_only=True)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Score a base or edited model on a sample of the stream.

        Args:
            model: a LifelongEditor.
            dataloaders: not used.
            ckpt_path: ``last`` for the run in ``run_dir``, or a checkpoint; null scores the base model.
            verbose: print the scores.
            datamodule: an EditStream.
            weights_only: always true.

        Returns:
            One dictionary with ``efficacy``, ``generalization`` and ``specificity``, those that were measured.
        """
        checkpoint = self._checkpoint(ckpt_path)
        with self._without_loggers():
            super().validate(model, dataloaders, checkpoint, verbose, datamodule, weights_only=True)
        return self._scores()

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Score a base or edited model on the whole stream.

        Args:
            model: a LifelongEditor.
            dataloaders: not used.
            ckpt_path: ``last`` for the run in ``run_dir``, or a checkpoint; null scores the base model.
            verbose: print the scores.
            datamodule: an EditStream.
            weights_only: always true.

        Returns:
            One dictionary with ``efficacy``, ``generalization`` and ``specificity``, those that were measured.
        """
        checkpoint = self._checkpoint(ckpt_path)
        with self._without_loggers():
            super().test(model, dataloaders, checkpoint, verbose, datamodule, weights_only=True)
        return self._scores()

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Generate a base or edited model's answers to the stream's prompts.

        Args:
            model: a LifelongEditor.
            dataloaders: not used.
            datamodule: an EditStream.
            return_predictions: return the answers, true by default.
            ckpt_path: ``last`` for the run in ``run_dir``, or a checkpoint; null asks the base model.
            weights_only: always true.
        """
        checkpoint = self._checkpoint(ckpt_path)
        with self._without_loggers():
            own = super().predict(model, dataloaders, datamodule, return_predictions, checkpoint, weights_only=True)
        return own if self.world_size == 1 or own is None else _interleaved(ranks.gather_parts(own))

    def tune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        out: str = "tuned.yaml",
        rows: str | None = None,
        minutes: float = 10.0,
        trials: int | None = None,
        rule: TuneRule = "token_match",
        floors: dict[str, float] | None = None,
        seed: int = 0,
    ) -> TuneResult:
        """Find sites, step, ridge and passes on rows that will not be edited.

        Nothing is written to ``run_dir``; the model's weights are put back.

        Args:
            model: a LifelongEditor.
            datamodule: an EditStream.
            out: file of the settings found, to be laid over the configuration; tune.json and tune.png come beside it.
            rows: file of the rows to try on, in the layout of data.path; null: data.warmup_path.
            minutes: how long the search may take, without loading.
            trials: try so many settings instead, whatever the clock says: the same search on any machine.
            rule: of the scores: token_match, or exact_match (what the model would write freely).
            floors: least efficacy, generalization or specificity; settings below come after all others.
            seed: of the order in which settings are tried.

        Returns:
            The result: ``suggestion()``, ``front()``, ``plot()``.

        Raises:
            SettingError: if there are no rows to try on, or the stream edits some of them.
        """
        if not isinstance(model, LifelongEditor) or not isinstance(datamodule, EditStream):
            raise SettingError("tune needs a LifelongEditor, and an EditStream as datamodule")
        if self.world_size > 1:
            raise SettingError(f"tune runs in one process, not in {self.world_size}: trainer.devices=1")
        model.configure_model()
        model.to(self.strategy.root_device)
        self.precision_plugin.convert_module(model)
        protected = next((one for one in self.callbacks if isinstance(one, ProtectedDirections)), None)
        found = tune(
            model,
            datamodule,
            rows=rows,
            minutes=minutes,
            trials=trials,
            rule=rule,
            floors=floors,
            seed=seed,
            progress=self.progress_bar_callback is not None,
            protect=None if protected is None else partial(protected.guards, model, datamodule),
        )
        self.tuned_files = found.write(Path(out).expanduser())
        return found

    def _checkpoint(self, ckpt_path: str | Path | None) -> Path | None:
        """The file that ``ckpt_path`` means; rank 0 finds it, and tells the others once they have met."""
        return self.run_directory.checkpoint(ckpt_path, ASK) if self.is_global_zero else None

    @contextlib.contextmanager
    def _opening(self) -> Iterator[Opening | None]:
        """Hold the run directory, at rank zero; until everything is checked, no logger begins."""
        callback = next(callback for callback in self.callbacks if isinstance(callback, RunOpening))
        loggers = self.loggers
        with (
            Opening(self.run_directory, self.overwrite) if self.is_global_zero else contextlib.nullcontext() as opening
        ):
            callback.opening, callback.loggers = opening, loggers
            try:
                yield opening
            finally:
                self.loggers, callback.opening, callback.loggers = loggers, None, None

    def _run(self, model: Any, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        environment = self._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # Lightning's saves inside the signal, in the middle of a turn
        if self.world_size > 1:
            # Lightning's SIGTERM handler meets the other ranks inside the signal, and hangs; TurnCheckpoint has one.
            self._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            self.strategy.setup_environment()
            start_from = getattr(model, "start_from", None)
            ckpt_path, start_from = ranks.broadcast((ckpt_path, start_from))
            self._checkpoint_connector._ckpt_path = ckpt_path
            if isinstance(model, LifelongEditor):
                model.start_from = start_from
        if self.state.fn == TrainerFn.FITTING:
            self.loggers = []  # RunOpening hands them back
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)

    def _fork_source(self, source: Path) -> Path:
        """The checkpoint file that ``fork_from`` means; a directory stands for its newest whole one."""
        run = RunDirectory(source) if source.is_dir() else self.run_directory
        if run.path.resolve() == self.run_directory.path.resolve() and source.is_dir():
            raise RunDirectoryError(f"--fork_from {source} is --run_dir itself: a fork needs a run_dir of its own")
        file = run.checkpoint(LAST if source.is_dir() else source, FORK)
        assert file is not None
        return file

    def _scores(self) -> list[Mapping[str, float]]:
        return [{kind: float(self.callback_metrics[kind]) for kind in KINDS if kind in self.callback_metrics}]

    @contextlib.contextmanager
    def _without_loggers(self) -> Iterator[None]:
        """Scoring writes no event file: curves belong to the edit run."""
        loggers, self.loggers = self.loggers, []
        try:
            yield
        finally:
            self.loggers = loggers

    def _with_defaults(self, given: list[Callback], progress: bool, checkpoints: bool) -> list[Callback]:
        """The given callbacks, and each default that none of them replaces."""
        for callback in given:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_directory.checkpoints)
        defaults: list[tuple[type, type[Callback], bool]] = [
            (RunOpening, RunOpening, True),
            (EditLedger, EditLedger, True),  # the last that may refuse a checkpoint
            (SettingsFile, SettingsFile, True),
            (RankAgreement, RankAgreement, True),
            (RunCurves, RunCurves, True),
            (StatisticsCheckpoint, StatisticsCheckpoint, True),
            (EditEvaluation, EditEvaluation, True),
            (ProgressBar, TurnProgress, progress),
            (RunAdvice, RunAdvice, True),
            (TurnCheckpoint, TurnCheckpoint, checkpoints),
        ]
        missing = [make() for kind, make, use in defaults if use and not any(isinstance(c, kind) for c in given)]
        # Advice is on what the given callbacks found, and a checkpoint has what all of them keep.
        late = (RunAdvice, Checkpoint)
        return [*(c for c in missing if not isinstance(c, late)), *given, *(c for c in missing if isinstance(c, late))]


def _interleaved(by_rank: list[list[list[Any]]]) -> list[list[Any]]:
    """Pieces whose items the ranks had divided as by ``ranks.own_part``, whole again."""
    pieces = []
    for parts in zip(*by_rank, strict=True):
        size = sum(map(len, parts))
        pieces.append([parts[i % len(parts)][i // len(parts)] for i in range(size)])
    return pieces


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    given = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    return [*given, AtomicCheckpointIO()]
