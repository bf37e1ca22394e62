"""Reading ``results.json``, without what wrote it."""

import json
from pathlib import Path
from typing import Any


def read_results(path: Path) -> dict[str, Any]:
    """The results of a run."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
