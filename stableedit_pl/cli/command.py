"""The command ``stableedit``: which verb, and what its errors mean for the exit code.

Nothing here imports torch, Lightning or transformers: they cost seconds, and each verb loads what it needs.
"""

import gc
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from jsonargparse import set_parsing_settings

from stableedit_pl.cli.front_page import PLAIN_VERBS, VERBS, answer, needs_no_verb
from stableedit_pl.cli.interrupts import ended_by_interrupts
from stableedit_pl.cli.parse_errors import OneLineErrors
from stableedit_pl.cli.screen import command, say
from stableedit_pl.cli.settings_files import ArgumentsError, check_files, dropped_callbacks
from stableedit_pl.data.records import DataError
from stableedit_pl.errors import IncompatibleCheckpoint, SettingError
from stableedit_pl.run.files.directory import RunDirectoryError
from stableedit_pl.run.files.ledger import LedgerError
from stableedit_pl.run.stop_signals import StopRequested

USER_ERRORS = (DataError, IncompatibleCheckpoint, LedgerError, RunDirectoryError, SettingError)
"""Errors whose message says all there is to say; anything else keeps its traceback."""

HEAVY_USER_ERRORS = {
    "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    "stableedit_pl.run.files.checkpoint_file": "CheckpointError",
    "stableedit_pl.model.loading": "LoadingError",
    "stableedit_pl.method.planning": "BadTurn",
    "stableedit_pl.devices.ranks": "RanksError",
    "stableedit_pl.model.sites": "SiteError",
}
"""More of them, in modules that take long to import. None can be raised before its module is there."""


INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments; those of the process by default.

    Raises:
        SystemExit: 1 after an error whose message was printed, 2 for wrong arguments, 130 or 143 after Ctrl-C or
            SIGTERM.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    arguments = sys.argv[1:] if args is None else list(args)
    OneLineErrors.said = arguments
    try:
        files = [] if needs_no_verb(arguments) else check_files(arguments)
        if needs_no_verb(arguments):
            answer(arguments)
        elif arguments[0] in PLAIN_VERBS:
            with _importing():
                from stableedit_pl.cli.plain_verbs import call_plain_verb

                import_module(f"stableedit_pl.cli.{arguments[0]}")
            call_plain_verb(arguments[0], arguments)
        else:
            with _importing():
                from stableedit_pl.cli.edit_cli import run_edit_cli
                from stableedit_pl.cli.named_callbacks import joined_values, taken_out
            if args is None:
                gc.freeze()  # what is imported stays: each search for garbage would go through all of it again
            for sentence in dropped_callbacks(files):
                say(sentence, error=True)
            rest, callback_settings = taken_out(list(joined_values(arguments)))
            run_edit_cli(arguments[0] if arguments[0] in VERBS else None, rest, callback_settings)
    except StopRequested as stop:
        if not _rank():
            say(f"\n{stop}; everything is saved. Go on with:\n  {_resume_command(arguments)}", error=True)
        raise SystemExit(stop.exit_code) from None
    except ArgumentsError as error:
        say(f"Error: {error}", error=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        say(f"\n{_rank()}Stopped.", error=True)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes it an exit with 1
            raise SystemExit(INTERRUPTED) from None
        raise
    except user_errors() as error:
        say(f"\n{_rank()}Error: {error}", error=True)
        raise SystemExit(1) from error


def _rank() -> str:
    """Which process of several speaks; empty for the first, or the only one."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or "0"
    return "" if number == "0" else f"[rank {number}] "


def user_errors() -> tuple[type[Exception], ...]:
    """All errors whose message says all there is to say, of the modules that are loaded."""
    heavy = [getattr(sys.modules[module], name) for module, name in HEAVY_USER_ERRORS.items() if module in sys.modules]
    return (*USER_ERRORS, *heavy)


@contextmanager
def _importing() -> Iterator[None]:
    """Import without looking for garbage: hundreds of thousands of new objects, hardly one of which is any.

    Ctrl-C ends the process meanwhile, as it ends any program: an exception in the middle of an import comes out as
    whatever the module at hand makes of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    with ended_by_interrupts():
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with a run started by ``arguments``, ready for a shell."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        once = name in ("--ckpt_path", "--overwrite", "--fork_from")
        if not skip and not once:
            kept.append(argument)
        skip = once and not value
    return shlex.join([command("stableedit"), *kept, "--ckpt_path", "last"])
