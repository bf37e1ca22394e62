"""Lifelong editing of language models on Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stableedit_pl.data.stream import EditStream
    from stableedit_pl.devices.sharded_strategy import ShardedStrategy
    from stableedit_pl.editor import LifelongEditor
    from stableedit_pl.trainer import EditTrainer

__all__ = ["EditStream", "EditTrainer", "LifelongEditor", "ShardedStrategy", "__version__"]

_HOMES = {
    "LifelongEditor": "editor",
    "EditStream": "data.stream",
    "EditTrainer": "trainer",
    "ShardedStrategy": "devices.sharded_strategy",
}


def __getattr__(name: str) -> Any:
    """Import public classes when they are first used: torch and transformers cost seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
