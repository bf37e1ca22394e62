"""Callbacks by their class names: settings of one from the command line, and one that is named again."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableedit_pl import callbacks
from stableedit_pl.cli.parse_errors import class_names, did_you_mean
from stableedit_pl.cli.settings_files import ArgumentsError

_FLAG = re.compile(r"--trainer\.callbacks\.([A-Z]\w*)\.([\w.]+)(?:=([\s\S]*))?")
_OWN = "stableedit_pl.callbacks"

DEFAULTS = (
    *("EditEvaluation", "EditLedger", "RankAgreement", "RunCurves", "StatisticsCheckpoint", "TurnCheckpoint"),
    "TurnProgress",
)
"""Callbacks that a run has unnamed, so that their settings can be changed without naming them."""


@dataclass(frozen=True)
class CallbackSetting:
    """``--trainer.callbacks.EditEvaluation.every_n_turns=3``.

    Attributes:
        name: the callback's class.
        setting: its argument.
        value: as typed.
    """

    name: str
    setting: str
    value: str


def taken_out(arguments: Sequence[str]) -> tuple[list[str], list[CallbackSetting]]:
    """Arguments without those that name a callback's class and setting, and these.

    Raises:
        ArgumentsError: if one has no value.
    """
    kept: list[str] = []
    taken: list[CallbackSetting] = []
    rest = iter(arguments)
    for argument in rest:
        found = _FLAG.fullmatch(argument)
        if found is None:
            kept.append(argument)
            continue
        value = found[3] if found[3] is not None else next(rest, None)
        if value is None:
            raise ArgumentsError(f"{argument} needs a value: {argument}=VALUE")
        taken.append(CallbackSetting(found[1], found[2], value))
    return kept, taken


def settled(given: Any, changes: Sequence[CallbackSetting]) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The list of callbacks as it is meant.

    Args:
        given: the parsed setting: None, one callback, or a list of them, each with ``class_path`` and ``init_args``.
        changes: settings by class name.

    Returns:
        The list where anything is other than given, else None; and what to say about it.

    Raises:
        ArgumentsError: if a change is of a callback that the run does not have.
    """
    listed = given if isinstance(given, list) else [] if given is None else [given]
    items = [_plain(item) for item in listed]
    kept: dict[str, dict[str, Any]] = {}
    said = []
    for number, item in enumerate(items):
        module, _, name = item["class_path"].rpartition(".")
        # Of Lightning's own and of users' there may be several, each with its settings.
        key = name if module.startswith(_OWN) else f"{number}"
        if key in kept:
            said.append(
                f"{name} is named twice: the later one replaces the first. One setting of it alone is changed by "
                f"--trainer.callbacks.{name}.SETTING=VALUE."
            )
        kept[key] = item
    for change in changes:
        item = _of_name(list(kept.values()), change)
        if item not in kept.values():
            kept[change.name] = item
        item["init_args"] = {**item.get("init_args", {}), change.setting: change.value}
    return (list(kept.values()) if said or changes else None), said


def _of_name(items: Sequence[dict[str, Any]], change: CallbackSetting) -> dict[str, Any]:
    for item in reversed(items):
        if str(item["class_path"]).rpartition(".")[2] == change.name:
            found: dict[str, Any] = item
            return found
    if change.name in DEFAULTS:
        return {"class_path": f"{_OWN}.{change.name}"}
    flag = f"--trainer.callbacks.{change.name}.{change.setting}"
    known = class_names("callbacks")
    if change.name in known or change.name in callbacks.__all__:
        raise ArgumentsError(f"{flag}: the run has no {change.name}; add it with --trainer.callbacks+={change.name}")
    raise ArgumentsError(f"{flag}: there is no callback {change.name}.{did_you_mean(change.name, known)}")


def _plain(item: Any) -> dict[str, Any]:
    found: Mapping[str, Any] = item.as_dict() if hasattr(item, "as_dict") else item
    return dict(found)


def joined_values(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments in which a negative number stands with its flag: ``--model.step_size -1e-3`` is no flag ``-1e-3``."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if re.fullmatch(r"--[\w.]+\+?", argument) and rest and re.fullmatch(_NEGATIVE, rest[0], re.IGNORECASE):
            argument = f"{argument}={rest.pop(0)}"
        yield argument


_NEGATIVE = r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf"
