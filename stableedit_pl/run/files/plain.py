"""Settings as plain values, for files that must not need Python to be read."""

from typing import Any


def plain(value: Any) -> Any:
    """Strings, numbers, booleans, None, lists and dictionaries only; private keys are left out."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
