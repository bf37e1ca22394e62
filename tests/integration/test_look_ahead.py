"""A whole run with its turns built one ahead: where they are built, and that nothing stays behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
from edit_runs import assert_same_state, fit, ledger, saved_state
from lightning.pytorch import Callback

from stableedit_pl.callbacks import TurnCheckpoint
from stableedit_pl.data.turns import Slot, Turn, TurnBuilder


class StopAt(Callback):
    """Breaks the run off in its third turn."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Turn, batch_idx: int) -> None:
        if batch.index == 2:
            raise self.error


def left_behind() -> list[threading.Thread]:
    """Threads that build turns, once those in the middle of one had time to finish it."""
    threads = [thread for thread in threading.enumerate() if thread.name == "next turn"]
    for thread in threads:
        thread.join(10)
    return [thread for thread in threads if thread.is_alive()]


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Which turn was built in which thread."""
    seen: list[tuple[int, str]] = []
    build = TurnBuilder.__call__

    def watched(self: TurnBuilder, index: int, slot: Slot) -> Turn:
        seen.append((index, threading.current_thread().name))
        return build(self, index, slot)

    monkeypatch.setattr(TurnBuilder, "__call__", watched)
    return seen


def test_every_turn_is_built_once_and_away_from_the_editing(
    tmp_path: Path, llama_folder: str, stream_file: str, builders: list[tuple[int, str]]
) -> None:
    fit(tmp_path / "run", llama_folder, {"path": stream_file})
    assert builders == [(turn, "next turn") for turn in range(5)]
    assert len(ledger(tmp_path / "run")) == 33 and not left_behind()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_a_run_that_is_broken_off_leaves_no_thread_and_resumes_where_it_was(
    tmp_path: Path, llama_folder: str, stream_file: str, builders: list[tuple[int, str]], error: BaseException
) -> None:
    fit(tmp_path / "whole", llama_folder, {"path": stream_file})
    builders.clear()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(
            tmp_path / "run",
            llama_folder,
            {"path": stream_file},
            callbacks=[StopAt(error), TurnCheckpoint(every_n_turns=1)],
        )
    assert not left_behind()
    assert [turn for turn, _ in builders] == [0, 1, 2, 3], "one beyond the turn it stopped in"
    builders.clear()
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, ckpt_path="last")
    assert [turn for turn, _ in builders] == [2, 3, 4], "what was built ahead is built again"
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))
    assert ledger(tmp_path / "run") == ledger(tmp_path / "whole")
