"""What the command writes to the screen, and what it keeps off it."""

import logging
import os
import sys
import warnings
from pathlib import Path


def command(name: str) -> str:
    """How to call a program of this environment: by its name where that is active, else by its path."""
    script = Path(sys.prefix) / "bin" / name
    if os.environ.get("VIRTUAL_ENV") == sys.prefix or not script.exists():
        return name
    relative = os.path.relpath(script)
    return relative if len(relative) < len(str(script)) else str(script)


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Write at once, so that what others print comes before or behind."""
    stream = sys.stderr if error else sys.stdout
    stream.write(text + end)
    stream.flush()


def quiet() -> None:
    """Keep what others print about themselves off the first screen; warnings about the run stay."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # inside Lightning
        r".*does not have many workers",  # tokenizing is not what takes time here
        r".*module\(s\) in eval mode at the start of training",  # edits are applied in eval mode
        r".*Total length of `list` across ranks is zero",  # no validation loop during an edit run
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_the_run)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    transformers = sys.modules.get("transformers")  # without it, there is no bar either
    if transformers is not None:
        transformers.utils.logging.disable_progress_bar()


def _is_about_the_run(record: logging.LogRecord) -> bool:
    chatter = ("Tip:", "TPU available", "GPU available", "`Trainer.fit` stopped: `max_epochs=1`")
    return not any(words in record.getMessage() for words in chatter)
