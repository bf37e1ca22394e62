"""``export`` and ``verify``: verbs that are a function's arguments, and load only what that function needs."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from stableedit_pl.cli.front_page import PLAIN_VERBS, VERBS, add_name, first_page
from stableedit_pl.cli.parse_errors import OneLineErrors
from stableedit_pl.cli.screen import quiet, say


def add_plain_verb(parser: ArgumentParser, verb: str, complete: bool) -> ArgumentParser:
    """Add one of ``PLAIN_VERBS`` to the command's parser.

    Args:
        parser: the first page.
        verb: its name.
        complete: with its options; else it is named only, and its function not imported.

    Returns:
        The parser of its options.
    """
    own = OneLineErrors(description=PLAIN_VERBS[verb])
    if complete:
        own.add_function_arguments(_function(verb))
    add_name(parser, verb, own)
    return own


def call_plain_verb(verb: str, arguments: list[str]) -> None:
    """Parse the arguments of a command that begins with a plain verb, and do it.

    Raises:
        SystemExit: 1 if the function found problems, 2 for wrong arguments.
    """
    parser = first_page()
    for other in VERBS:
        if other in PLAIN_VERBS:
            add_plain_verb(parser, other, complete=other == verb)
        else:
            add_name(parser, other)
    quiet()
    run_plain_verb(verb, parser.parse_args(arguments)[verb].as_dict())


def run_plain_verb(verb: str, settings: dict[str, Any]) -> None:
    """Call a plain verb's function, and say what came of it.

    Args:
        verb: one of ``PLAIN_VERBS``.
        settings: parsed arguments.

    Raises:
        SystemExit: 1 if the function found problems.
    """
    settings.pop("config", None)
    done = _function(verb)(**settings)
    if verb == "export":
        say(f"Wrote {done}: load it with AutoModelForCausalLM.from_pretrained({str(done)!r}).")
        return
    say(done.text())
    if done.problems:
        raise SystemExit(1)


def _function(verb: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"stableedit_pl.cli.{verb}"), f"{verb}_run")
    return function
