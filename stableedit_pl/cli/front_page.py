"""The command's first page: what it says before any verb's own options, without what costs seconds to import."""

from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from stableedit_pl import __version__
from stableedit_pl.cli.parse_errors import OneLineErrors

EDIT_VERBS = {
    "fit": "Apply a stream of edits to a model.",
    "validate": "Score a base or edited model on a sample of the stream.",
    "test": "Score a base or edited model on the whole stream.",
    "predict": "Generate a base or edited model's answers to the stream's prompts.",
    "tune": "Find sites, step, ridge and passes on rows that will not be edited.",
}
"""Methods of the trainer, and the first sentences of their docstrings."""

PLAIN_VERBS = {
    "export": "Write a run's edited model as an ordinary Hugging Face folder.",
    "verify": "Check that a run directory is whole and belongs together.",
}
"""Verbs that take a function's arguments, and neither model, data nor trainer."""

VERBS = EDIT_VERBS | PLAIN_VERBS

PARSER: dict[str, Any] = {
    "parser_mode": "omegaconf+",
    "description": "Lifelong editing of language models: run, resume, score and export streams of edits.",
    "version": __version__,
}
"""Settings of the parser that all verbs hang on."""


def first_page() -> ArgumentParser:
    """The parser of everything that stands before a verb, with no verb yet.

    Returns:
        A parser with the texts of the whole command's.
    """
    parser = OneLineErrors(env_prefix="PL", default_env=False, **PARSER)  # as LightningCLI's
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
    )
    parser.add_subcommands()
    return parser


def add_name(parser: ArgumentParser, verb: str, options: ArgumentParser | None = None) -> None:
    """Put a verb on the first page.

    Args:
        parser: the first page.
        verb: one of ``VERBS``.
        options: parser of its own options; none to have it named only.
    """
    assert parser._subcommands_action is not None
    own = OneLineErrors(description=VERBS[verb]) if options is None else options
    parser._subcommands_action.add_subcommand(verb, own, help=VERBS[verb])


def needs_no_verb(arguments: list[str]) -> bool:
    """Whether the first page is the whole answer: help, the version, or that no such verb is known."""
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        return True
    return arguments[0] not in VERBS and not arguments[0].startswith("-")


def answer(arguments: list[str]) -> None:
    """Answer what :func:`needs_no_verb`.

    Raises:
        SystemExit: always; 0 after help and version, 2 after an error.
    """
    parser = first_page()
    for verb in VERBS:
        add_name(parser, verb)
    parser.parse_args(arguments)
