"""``EditCLI``: LightningCLI with a run directory."""

import json
import re
import sys
from collections.abc import Sequence
from enum import Enum
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf.errors import OmegaConfBaseException

import stableedit_pl.callbacks  # noqa: F401  (their short names work once they are imported)
from stableedit_pl.cli.front_page import PARSER, PLAIN_VERBS
from stableedit_pl.cli.named_callbacks import CallbackSetting, settled
from stableedit_pl.cli.parse_errors import OneLineErrors, one_line
from stableedit_pl.cli.plain_verbs import add_plain_verb, run_plain_verb
from stableedit_pl.cli.screen import command, quiet, say
from stableedit_pl.cli.settings_files import ArgumentsError
from stableedit_pl.data.stream import EditStream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.model.scoring import KINDS
from stableedit_pl.run.files.directory import RunDirectory, remove_empty, write_atomically
from stableedit_pl.run.results import edits_per_second, read_results, results_table, scores_table
from stableedit_pl.trainer import EditTrainer


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


# jsonargparse writes the settings of a class down before it makes it, and yaml knows no enum (Timer has one).
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


class EditParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors of one line."""


class EditCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict`` and ``tune`` on edit streams, ``export`` and ``verify``."""

    trainer: EditTrainer
    model: LifelongEditor

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs that are methods of the trainer, each with the arguments that are no options."""
        return {**LightningCLI.subcommands(), "tune": {"model", "datamodule"}}

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

    def __init__(
        self, verb: str | None, *args: Any, callback_settings: Sequence[CallbackSetting] = (), **kwargs: Any
    ) -> None:
        """Prepare for one verb.

        Args:
            verb: the only verb that is asked for; None if that is not known yet.
            callback_settings: settings of callbacks by class name.
            args: as for LightningCLI.
            kwargs: as for LightningCLI.
        """
        self._verb = verb
        self._callback_settings = callback_settings
        super().__init__(*args, **{"parser_class": EditParser, **kwargs})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._verb in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)  # named in lists of verbs; its options would take a tenth of a second

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for verb in PLAIN_VERBS:
            own = add_plain_verb(parser, verb, complete=self._verb in (None, verb))
            self._subcommand_parsers[verb] = own  # type: ignore[assignment]

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's settings silently overrule the command line."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and put callbacks that are named by their class where they belong.

        Raises:
            ArgumentsError: if a reference leads nowhere, or a callback's setting is of none that the run has.
        """
        args = sys.argv[1:] if args is None else args
        OneLineErrors.said = list(args)
        try:
            silent = [argument for argument in args if not argument.startswith("--print_config")]
            self.config = parser.parse_args(silent)
            verb = self.config.get("subcommand")
            callbacks: list[dict[str, Any]] | None = None
            said: list[str] = []
            if verb is not None and verb not in PLAIN_VERBS:
                callbacks, said = settled(self.config[verb].get("trainer.callbacks"), self._callback_settings)
            for sentence in said:
                say(sentence, error=True)
            if callbacks is not None:
                args = [*args, f"--trainer.callbacks={json.dumps(callbacks, default=str)}"]
            if callbacks is not None or len(silent) < len(args):
                self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            key = str(getattr(error, "full_key", None) or "a setting").removeprefix(f"{self._verb}.")
            reason = str(getattr(error, "msg", None) or error).splitlines()[0]
            raise ArgumentsError(
                f"{key}: {reason}. ${{NAME}} stands for another setting; for an environment variable write "
                "${oc.env:NAME}, for the characters themselves \\${NAME}."
            ) from error

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a plain verb needs none of them.

        Raises:
            SettingError: if one of them, a callback, a logger or a plugin refuses its settings.
        """
        if self.subcommand in PLAIN_VERBS:
            return
        try:
            super().instantiate_classes()
        except (SettingError, MisconfigurationException):
            raise
        except ImportError as error:
            raise SettingError(f"{one_line(error)}: install what is missing, or leave the setting out") from error
        except (ValueError, TypeError, RuntimeError) as error:
            twice = re.search(r"more than one stateful callback of type `(\w+)`", str(error))
            raise SettingError(
                f"two callbacks {twice[1]} that could not be told apart in a checkpoint: keep one, or give them other "
                "settings"
                if twice
                else one_line(error)
            ) from error

    def _set_seed(self) -> None:
        if self.config.get("subcommand") in PLAIN_VERBS:
            return
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingError(f"seed_everything: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in PLAIN_VERBS:
            super()._run_subcommand(subcommand)
        else:
            run_plain_verb(subcommand, self.config[subcommand].as_dict())

    def after_fit(self) -> None:
        """Show the final scores and where to look at the run."""
        run = self.trainer.run_directory
        if not self.trainer.is_global_zero or not run.results.is_file():
            return
        results = read_results(run.results)
        turns = f"{results['turns'] - results['warmup_turns']} turns"
        warmup = f" after {results['warmup_turns']} warm-up turns" if results["warmup_turns"] else ""
        say(f"\n{results['edits']} edits in {turns}{warmup} ({results['settings']['scoring']})")
        speed, evaluate = edits_per_second(results), results["seconds"]["evaluate"]
        say(f"{speed:.0f} edits per second of editing; {evaluate:.0f} s of evaluation\n")
        say(results_table(results))
        say(f"\nCurves:  {command('tensorboard')} --logdir {run.path}")
        say(f"Export:  {command('stableedit')} export --run {run.path} --out MY_MODEL")

    def after_validate(self) -> None:
        """Show the scores."""
        if not self.trainer.is_global_zero:
            return
        scores = {kind: self.trainer.callback_metrics.get(kind) for kind in KINDS}
        given = {kind: None if value is None else float(value) for kind, value in scores.items()}
        reference = self.model.specificity_measured_by
        say(f"\nScored by {self.model.scoring}; specificity against {reference}", end="")
        say("" if self.model.edits_scored else " (an unedited model always agrees with itself)")
        say(scores_table({"edited" if self.model.edits_scored else "base": given}))

    after_test = after_validate

    def tune(self, **kwargs: Any) -> None:
        """Search, and say what was found and how to use it."""
        found = self.trainer.tune(**kwargs)
        say(f"\n{len(found.streams)} settings tried; the front:\n{found.table()}\n")
        for file in self.trainer.tuned_files:
            say(f"Wrote {file}")
        given = self.config[self.subcommand].get("config") or []
        files = " ".join(f"--config {file}" for file in [*given, self.trainer.tuned_files[0]])
        say(f"Next:  {command('stableedit')} fit {files} --run_dir runs/tuned")

    def predict(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Generate answers and write them to the run directory, in a file named for whose they are."""
        run, zero = self.trainer.run_directory, self.trainer.is_global_zero
        made = run.make() if zero else []
        try:
            pieces = self.trainer.predict(**{**kwargs, "ckpt_path": ckpt_path, "return_predictions": True}) or []
            if not zero:
                return
            lines = [json.dumps(answer, ensure_ascii=False) for piece in pieces for answer in piece]
            file = run.predictions_of(ckpt_path)
            write_atomically(file, "".join(line + "\n" for line in lines))
        finally:
            remove_empty(made)
        say(f"Wrote {len(lines)} answers of the {'base' if ckpt_path is None else 'edited'} model to {file}")


def run_edit_cli(verb: str | None, args: Sequence[str], callback_settings: Sequence[CallbackSetting] = ()) -> None:
    """Parse the arguments and do what they say.

    Args:
        verb: the verb they begin with; None if they begin with an option.
        args: arguments.
        callback_settings: settings of callbacks by class name, taken out of them.
    """
    quiet()
    EditCLI(
        verb,
        LifelongEditor,
        EditStream,
        save_config_callback=SaveSettings,
        trainer_class=EditTrainer,
        seed_everything_default=0,
        parser_kwargs=dict(PARSER),
        auto_configure_optimizers=False,
        args=list(args),
        callback_settings=callback_settings,
    )
