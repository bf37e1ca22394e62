"""Fixtures of the unit tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSONL, or as a JSON array, or raw text or bytes, to a file of a given name."""

    def write_file(content: Any, name: str = "edits.jsonl", array: bool = False) -> Path:
        path = tmp_path / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif array:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return write_file
