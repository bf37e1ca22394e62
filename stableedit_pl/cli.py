"""The command ``stableedit``: LightningCLI with a run directory, and ``export``."""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import stableedit_pl.callbacks  # noqa: F401  (their short names work once they are imported)
from stableedit_pl import __version__
from stableedit_pl.checkpoint_io import CheckpointError
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import IncompatibleCheckpoint, SettingError
from stableedit_pl.export import export_run
from stableedit_pl.ledger import LedgerError
from stableedit_pl.loading import LoadingError
from stableedit_pl.planning import BadTurn
from stableedit_pl.records import DataError
from stableedit_pl.results import edits_per_second, read_results, results_table, scores_table
from stableedit_pl.run_directory import RunDirectory, RunDirectoryError
from stableedit_pl.scoring import KINDS
from stableedit_pl.sites import SiteError
from stableedit_pl.stop_signals import StopRequested
from stableedit_pl.stream import EditStream
from stableedit_pl.trainer import EditTrainer
from stableedit_pl.verify import Verdict, verify_run

_DESCRIPTION = "Lifelong editing of language models: run, resume, score and export streams of edits."

USER_ERRORS = (
    BadTurn,
    CheckpointError,
    DataError,
    IncompatibleCheckpoint,
    LedgerError,
    LoadingError,
    MisconfigurationException,
    RunDirectoryError,
    SettingError,
    SiteError,
)
"""Errors whose message says all there is to say; anything else keeps its traceback."""

PLAIN_VERBS: dict[str, tuple[Callable[..., Any], str]] = {
    "export": (export_run, "Write a run's edited model as an ordinary Hugging Face folder."),
    "verify": (verify_run, "Check that a run directory is whole and belongs together."),
}
"""Verbs that take their function's arguments, and neither model, data nor trainer."""


class SaveSettings(SaveConfigCallback):
    """Saves an edit run's full settings; a resumed run's beside them, numbered."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing yet: a run that fails before its first turn leaves no settings behind."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save when the run starts or resumes."""
        file = RunDirectory(trainer.default_root_dir).next_config()
        if trainer.is_global_zero:
            settings = self.config.clone()
            # What was said of this one start is no setting of the run: repeating it must not overwrite anything.
            settings["overwrite"], settings["ckpt_path"] = False, None
            self.parser.save(settings, str(file), skip_none=False, overwrite=False, multifile=False)


class EditCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` on edit streams, ``export`` and ``verify``."""

    trainer: EditTrainer
    model: LifelongEditor

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add model and data before the trainer, whose many options few runs need."""
        parser.add_lightning_class_args(LifelongEditor, "model")
        parser.add_lightning_class_args(EditStream, "data")
        parser.add_lightning_class_args(EditTrainer, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, which everything that writes is linked to."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Everything a run writes lies in here.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace a run that is already in run_dir.")
        parser.add_argument(
            "--fork_from", type=str | None, default=None, help="Start with the weights and statistics of this run."
        )
        parser.link_arguments("run_dir", "trainer.run_dir")
        parser.link_arguments("fork_from", "trainer.fork_from")
        parser.link_arguments("overwrite", "trainer.overwrite")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for verb, (function, description) in PLAIN_VERBS.items():
            plain = LightningArgumentParser(description=description)
            plain.add_function_arguments(function)
            self._subcommand_parsers[verb] = plain
            parser._subcommands_action.add_subcommand(verb, plain, help=description)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's settings silently overrule the command line."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a plain verb needs none of them."""
        if self.subcommand not in PLAIN_VERBS:
            super().instantiate_classes()

    def _set_seed(self) -> None:
        if self.config.get("subcommand") not in PLAIN_VERBS:
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in PLAIN_VERBS:
            super()._run_subcommand(subcommand)
            return
        settings = self.config[subcommand].as_dict()
        settings.pop("config", None)
        done = PLAIN_VERBS[subcommand][0](**settings)
        if isinstance(done, Verdict):
            _say(done.text())
            if done.problems:
                raise SystemExit(1)
        else:
            _say(f"Wrote {done}: load it with AutoModelForCausalLM.from_pretrained({str(done)!r}).")

    def after_fit(self) -> None:
        """Show the final scores and where to look at the run."""
        run = self.trainer.run_directory
        if not self.trainer.is_global_zero or not run.results.is_file():
            return
        results = read_results(run.results)
        turns = f"{results['turns'] - results['warmup_turns']} turns"
        warmup = f" after {results['warmup_turns']} warm-up turns" if results["warmup_turns"] else ""
        _say(f"\n{results['edits']} edits in {turns}{warmup} ({results['settings']['scoring']})")
        speed, evaluate = edits_per_second(results), results["seconds"]["evaluate"]
        _say(f"{speed:.0f} edits per second of editing; {evaluate:.0f} s of evaluation\n")
        _say(results_table(results))
        _say(f"\nCurves:  {_command('tensorboard')} --logdir {run.path}")
        _say(f"Export:  {_command('stableedit')} export --run {run.path} --out MY_MODEL")

    def after_validate(self) -> None:
        """Show the scores."""
        scores = {kind: self.trainer.callback_metrics.get(kind) for kind in KINDS}
        given = {kind: None if value is None else float(value) for kind, value in scores.items()}
        reference = self.model.specificity_measured_by
        _say(f"\nScored by {self.model.scoring}; specificity against {reference}", end="")
        _say("" if self.model.edits_loaded else " (an unedited model always agrees with itself)")
        _say(scores_table({"edited" if self.model.edits_loaded else "base": given}))

    after_test = after_validate

    def predict(self, **kwargs: Any) -> None:
        """Generate answers and write them to ``predictions.jsonl`` in the run directory."""
        pieces = self.trainer.predict(**{**kwargs, "return_predictions": True}) or []
        run = self.trainer.run_directory
        run.path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(answer, ensure_ascii=False) for piece in pieces for answer in piece]
        run.predictions.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        _say(f"Wrote {len(lines)} answers to {run.predictions}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments; those of the process by default.

    Raises:
        SystemExit: 1 after an error whose message was printed, 2 for wrong arguments, 130 or 143 after Ctrl-C or
            SIGTERM.
    """
    _quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try:
        EditCLI(
            LifelongEditor,
            EditStream,
            save_config_callback=SaveSettings,
            trainer_class=EditTrainer,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "description": _DESCRIPTION, "version": __version__},
            auto_configure_optimizers=False,
            args=None if args is None else list(args),
        )
    except StopRequested as stop:
        resume = _resume_command(sys.argv[1:] if args is None else args)
        _say(f"\n{stop}; everything is saved. Go on with:\n  {resume}", error=True)
        raise SystemExit(stop.exit_code) from None
    except USER_ERRORS as error:
        _say(f"\nError: {error}", error=True)
        raise SystemExit(1) from error


def _resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with a run started by ``arguments``, ready for a shell."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        once = name in ("--ckpt_path", "--overwrite", "--fork_from")
        if not skip and not once:
            kept.append(argument)
        skip = once and not value
    return shlex.join([_command("stableedit"), *kept, "--ckpt_path", "last"])


def _command(name: str) -> str:
    """How to call a program of this environment: by its name where that is active, else by its path."""
    script = Path(sys.prefix) / "bin" / name
    if os.environ.get("VIRTUAL_ENV") == sys.prefix or not script.exists():
        return name
    relative = os.path.relpath(script)
    return relative if len(relative) < len(str(script)) else str(script)


def _quiet() -> None:
    """Keep what others print about themselves off the first screen; warnings about the run stay."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # inside Lightning
        r".*does not have many workers",  # tokenizing is not what takes time here
        r".*module\(s\) in eval mode at the start of training",  # edits are applied in eval mode
        r".*Total length of `list` across ranks is zero",  # no validation loop during an edit run
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_the_run)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _is_about_the_run(record: logging.LogRecord) -> bool:
    chatter = ("Tip:", "TPU available", "GPU available", "`Trainer.fit` stopped: `max_epochs=1`")
    return not any(words in record.getMessage() for words in chatter)


def _say(text: str, error: bool = False, end: str = "\n") -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(text + end)
    stream.flush()
