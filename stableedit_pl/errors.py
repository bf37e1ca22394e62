"""Errors that users can mend; their messages say all there is to say, so the command line prints no traceback."""

from typing import Any, get_args


class SettingError(ValueError):
    """A setting that is out of range or contradicts another; the message names it and what it may be."""


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
