"""Freed memory is handed back where the C library can, and a checkpoint does it."""

from pathlib import Path

import pytest
from edit_runs import fit

from stableedit_pl.callbacks import TurnCheckpoint, turn_checkpoint
from stableedit_pl.run import freed_memory


def test_the_c_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: asked.append)
    freed_memory.hand_back()
    assert asked == [0]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    freed_memory._malloc_trim.cache_clear()
    assert freed_memory._malloc_trim() is None
    freed_memory.hand_back()
    freed_memory._malloc_trim.cache_clear()


def test_every_checkpoint_hands_memory_back(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(turn_checkpoint, "hand_back", lambda: calls.append(1))
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[TurnCheckpoint(every_n_turns=2)])
    assert len(calls) == 4  # positions 0, 2, 4 and the end, 5
