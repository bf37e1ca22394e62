"""What is wrong with arguments, in one line: which flag or file, what was meant perhaps, and what may be there."""

import difflib
import inspect
import re
import sys
from argparse import Action
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from stableedit_pl.cli.settings_files import ArgumentsError, lookup, named_files, read_nodes, scalars

KINDS = {
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
    "<class 'list'>": "a list, [a, b]",
    "<class 'dict'>": "settings, {a: 1}",
}

FAMILIES = {"callbacks": "callback", "logger": "logger"}
"""Settings that name classes, and the word for one of these."""

SOURCES = {
    "callbacks": ("stableedit_pl.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lightning.pytorch.loggers",),
}
"""Modules whose ``__all__`` has these classes."""


class OneLineErrors(ArgumentParser):
    """A parser that answers wrong arguments with one line, and its usage with ``--help`` alone."""

    said: Sequence[str] = ()
    """The arguments that are parsed, for all parsers of the command."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with 2; a parser inside another raises as ever."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"Error: {explained(parser, message, OneLineErrors.said)}\n")
        sys.exit(2)


def explained(parser: ArgumentParser, message: str, arguments: Sequence[str]) -> str:
    """A parser's message in one line.

    Args:
        parser: of the verb.
        message: as jsonargparse has it.
        arguments: what was typed.
    """
    rules = (
        (r"^Parser key \"(\S+?)\":?\s*([\s\S]*)", _wrong_value),
        (r"unrecognized arguments: (.+)", _unrecognized),
        (r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", _no_verb),
        (r"expected \"subcommand\" to be one of \{(.*?)\}", _verb_missing),
        (r"argument (\S+): expected one argument", lambda _, __, found: f"{found[1]} needs a value: {found[1]}=VALUE"),
        (r"the following arguments are required: (.+)", _required),
        (r"does not accept option '(.+?)'", _unknown_setting),
        (r"^Option '(\S+?)' is not accepted", _unknown_setting),
    )
    for pattern, explain in rules:
        found = re.search(pattern, message)
        if found:
            return " ".join(explain(parser, arguments, found).split())
    return " ".join(message.split())


def did_you_mean(word: str, choices: Iterable[str], cutoff: float = 0.7) -> str:
    """`` Did you mean ...?``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(choices), n=2, cutoff=cutoff)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def one_line(error: BaseException) -> str:
    """An error of a class that a setting names, without what jsonargparse puts around it."""
    text = str(error) or type(error).__name__
    text = _bullets(text)[0] if "Union subtypes" in text else text
    text = re.sub(r"Problem with given class_path '(?:\S+\.)?(\w+)':", r"\1:", text)
    return " ".join(text.split())


def _bullets(text: str) -> list[str]:
    """The outer points of jsonargparse's list of errors; the whole text where it has none."""
    first = re.search(r"Errors:\s*?\n( *)- ", text)
    if first is None:
        return [text]
    end = re.search(rf"\n {{0,{max(0, len(first[1]) - 2)}}}\S", text[first.end() :])
    listed = text[first.end() : first.end() + end.start()] if end else text[first.end() :]
    return listed.split(f"\n{first[1]}- ")


def _unrecognized(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    words = [word for word in found[1].split() if word.startswith("--")]
    if not words:
        return f"{found[1]}: no flag stands before it; a list is written [a,b], and a text with spaces in quotes"
    name = words[0].partition("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return f"there is no {name}.{_near(name, flags) or _help(parser)}"


def _near(name: str, known: Sequence[str]) -> str:
    """Near names; also those that lack their group, as ``--step_size``."""
    last = name.strip("-").rpartition(".")[2]
    complete = [other for other in known if other.strip("-").rpartition(".")[2] == last]
    return f" Did you mean {' or '.join(complete[:2])}?" if complete else did_you_mean(name, known)


def _help(parser: ArgumentParser) -> str:
    return f" {parser.prog.replace(' [options]', '')} --help lists all."


def _no_verb(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    verbs = re.findall(r"[\w-]+", found[2])
    return f"there is no verb {found[1]}.{did_you_mean(found[1], verbs, 0.5)} Verbs: {', '.join(verbs)}."


def _verb_missing(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    verbs = getattr(parser._subcommands_action, "choices", None) or found[1].split(",")
    return f"no verb: choose from {', '.join(verbs)}; stableedit --help says what they do"


def _required(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    names = [name.strip().partition(".")[2] for name in found[1].split(",")]
    verb = found[1].partition(".")[0]
    way = "" if verb in ("export", "verify") else ", or --config FILE with it" + ("" if len(names) == 1 else " all")
    return f"{verb} needs {', '.join(f'--{name}' for name in names)}{way}"


def _unknown_setting(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    name = found[1]
    known = [action.dest for action in parser._actions if action.dest != "help"]
    groups = sorted({dest.partition(".")[0] for dest in known if "." in dest})
    head, _, rest = name.partition(".")
    near = ""
    if rest and head not in groups:
        own = [f"{group}.{rest}" for group in difflib.get_close_matches(head, groups, n=1)]
        near = f" Did you mean {own[0]}?" if own and own[0] in known else did_you_mean(head, groups)
    near = near or _near(name, known) or _help(parser)
    return f"{_where(arguments, name)}there is no setting {name}.{near}"


def _wrong_value(parser: ArgumentParser, arguments: Sequence[str], found: re.Match[str]) -> str:
    verbs = getattr(parser._subcommands_action, "choices", None) or {}
    key, body = found[1], found[2]
    if key.partition(".")[0] in verbs:
        key = key.partition(".")[2]
    family = key.rpartition(".")[2]
    if family in FAMILIES:
        return _wrong_class(arguments, key, family, body)
    values = re.findall(r"(?:Got|Given) value: (.*)", body)
    value = values[-1].strip() if values else None
    action = next((action for action in parser._actions if action.dest == key), None)
    return (
        f"{_where(arguments, key, value or '')}{key} is {_shown(value)}, but must be {_expected(body, action, value)}"
    )


def _expected(body: str, action: Action | None, value: str | None) -> str:
    kinds: list[str] = []
    near = ""
    for kind in re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\]|[\w.]+)", body):
        if kind.startswith("typing.Literal"):
            choices = re.findall(r"'(.*?)'", kind)
            kinds.append(f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0])
            near = near or did_you_mean(value or "", choices, 0.5)
        else:
            kinds.append(KINDS.get(kind, kind))
    if not kinds:
        return " ".join(body.split())
    return " or ".join(dict.fromkeys(kinds)) + (f".{near}" if near else "")


def _shown(value: str | None) -> str:
    return "what it is" if value is None else value if len(value) <= 60 else value[:57] + "..."


def _wrong_class(arguments: Sequence[str], key: str, family: str, body: str) -> str:
    """About a class that is named, or a setting of one."""
    word = FAMILIES[family]
    path, problem = "", body
    for bullet in _bullets(body):
        found = re.match(r"Problem with given class_path '(\S+?)':\s*([\s\S]*)", bullet)
        if found:  # the base class comes last, and only says the same once more
            path, problem = found[1], found[2]
            break
    name = path.rpartition(".")[2]
    setting = re.search(r"Option '(\S+?)' is not accepted", problem)
    if setting and name in ("Callback", "Logger"):
        return (
            f"--{key}.{setting[1]}: a setting of which {word}? Name it before, --{key}+=NAME, or in the flag, "
            f"--{key}.NAME.{setting[1]}"
        )
    if setting:
        known = _parameters(path)
        near = did_you_mean(setting[1], known) or f" It has: {', '.join(known)}."
        return f"{_where(arguments, key, setting[1])}{name} has no setting {setting[1]}.{near}"
    value = re.search(r"Parser key \"(\S+?)\":\s*([\s\S]*)", problem)
    if value:
        given = re.findall(r"(?:Got|Given) value: (.*)", problem)
        shown = given[0].strip() if given else None
        return (
            f"{_where(arguments, key, value[1])}{name}.{value[1]} is {_shown(shown)}, but must be "
            f"{_expected(value[2], None, shown)}"
        )
    unknown = re.search(r"(?:Expected a dot import path string|Unexpected import path format): (\S+)", body)
    if unknown:
        near = did_you_mean(unknown[1].rpartition(".")[2], class_names(family))
        own = near or f" One of your own is given by its import path, my_package.My{word.capitalize()}."
        return f"{_where(arguments, key, unknown[1])}there is no {word} {unknown[1]}.{own}"
    given = re.findall(r"(?:Got|Given) value: (.*)", body)
    shown = _shown(given[-1].strip() if given else None)
    if "does not correspond to a subclass" in body:
        return f"{_where(arguments, key, shown)}{shown} is no {word}"
    missing = re.search(r"(?:arguments are required|is required|required)[^:\n]*: (.+)", problem)
    if missing:
        return f"{_where(arguments, key)}{name} needs {missing[1]}: --{key}.{missing[1].partition(',')[0]}=VALUE"
    cause = " ".join((problem if path else body).split())
    return f"{_where(arguments, key)}{path or shown} cannot be a {word}: {cause[:300]}"


def class_names(family: str) -> list[str]:
    """Names of the callbacks, or loggers, that need no import path."""
    return [name for module in SOURCES[family] for name in getattr(import_module(module), "__all__", [])]


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        kind: Any = getattr(import_module(module), name)
        return [each for each in inspect.signature(kind.__init__).parameters if each not in ("self", "args", "kwargs")]
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _where(arguments: Sequence[str], key: str, word: str = "") -> str:
    """Which flag, or which line of which file, says this: ``my.yaml, line 3: ``; empty if none does."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith(f"--{key}")]
    spoken = [argument for argument in arguments if argument.startswith(f"--{key}") and word in argument]
    if spoken or (flags and not word):
        return ""
    for file in reversed(named_files(arguments)):
        place = _line(file, key, word)
        if place:
            return f"{file}, line {place}: "
    return ""


def _line(file: Path, key: str, word: str) -> int | None:
    try:
        found = lookup(read_nodes(file), key)
    except ArgumentsError:
        return None
    if found is None:
        return None
    for scalar in scalars(found[1]) if word else ():
        if scalar.value == word:
            return int(scalar.start_mark.line) + 1
    node: yaml.Node = found[0]
    return None if word else int(node.start_mark.line) + 1
