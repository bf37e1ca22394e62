"""Errors that users can mend; their messages say all there is to say, so the command line prints no traceback."""

from collections.abc import Mapping
from typing import Any, get_args


class SettingError(ValueError):
    """A setting that is out of range or contradicts another; the message names it and what it may be."""


class LoadingError(ValueError):
    """A base model that cannot be had under the name given, or whose weights cannot be edited."""


class IncompatibleCheckpoint(ValueError):
    """Saved state of another model, method or stream; the message says what differs."""


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Hold a setting against a ``Literal``; Python callers get no check from the command line.

    Raises:
        SettingError: naming the setting, what it was and what it may be.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise SettingError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


GO_ON = (
    "Go on with the old settings; or start a new run in another --run_dir, without --ckpt_path: from the base "
    "model, or from this run's weights and statistics with --fork_from RUN_DIR."
)
"""What to do when a run is resumed with other settings."""


def refuse_differences(source: str, old: Mapping[str, Any], new: Mapping[str, Any], remedy: str = GO_ON) -> None:
    """Compare what a checkpoint was made with and what it is loaded into.

    Args:
        source: what holds the old values, for the message.
        old: name to value as stored.
        new: name to value now.
        remedy: what to do about it.

    Raises:
        IncompatibleCheckpoint: listing every name whose values differ.
    """
    names = [*old, *(name for name in new if name not in old)]
    differing = [name for name in names if old.get(name) != new.get(name)]
    if not differing:
        return
    table = [("setting", f"in {source}", "now")]
    table += [(name, *_where_they_differ(str(old.get(name)), str(new.get(name)))) for name in differing]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    raise IncompatibleCheckpoint(
        f"{source} belongs to another run:\n" + "\n".join(line.rstrip() for line in lines) + f"\n{remedy}"
    )


def _where_they_differ(old: str, new: str, width: int = 60) -> tuple[str, str]:
    """Both values cut to ``width`` letters, from a little before the first that differs."""
    common = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    begin = 0 if max(len(old), len(new)) <= width else max(0, common - width // 3)

    def cut(value: str) -> str:
        piece = value[begin : begin + width]
        return ("..." if begin else "") + piece + ("..." if begin + width < len(value) else "")

    return cut(old), cut(new)
