"""A small model that knows an invented world, and streams of edits to it; made by ``scripts/demo/build_demo.py``."""

from pathlib import Path


def demo_path(name: str) -> Path:
    """Where a part of the demo lies: ``model``, ``edits.jsonl`` or ``warmup.jsonl``."""
    return Path(__file__).parent / name
