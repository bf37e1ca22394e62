"""Checkpoint files: whole or absent, and loading executes no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from stableedit_pl.run.files import checkpoint_io
from stableedit_pl.run.files.checkpoint_io import AtomicCheckpointIO, CheckpointError

IO = AtomicCheckpointIO()


def state(value: float) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((300,), value)}, "turns": int(value), "names": ["a", None, 1.5, True]}


class Killed(BaseException):
    """Nothing on the way up may handle it, as with a real kill."""


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "not" / "yet" / "there.ckpt"
    IO.save_checkpoint(state(3.0), file)
    got = IO.load_checkpoint(file)
    assert torch.equal(got["state_dict"]["w"], torch.full((300,), 3.0))
    assert (got["turns"], got["names"]) == (3, ["a", None, 1.5, True])
    assert [f.name for f in file.parent.iterdir()] == ["there.ckpt"]
    IO.save_checkpoint(state(4.0), str(file))
    assert IO.load_checkpoint(str(file))["turns"] == 4


def test_a_crash_before_any_call_leaves_the_old_checkpoint_or_the_new(tmp_path: Path, monkeypatch: Any) -> None:
    file, states = tmp_path / "last.ckpt", []
    calls = [(torch, "save"), (os, "fsync"), (os, "replace"), (os, "open")]
    for crash in range(1, 10):
        IO.save_checkpoint(state(1.0), file)
        with monkeypatch.context() as patch:
            seen: list[str] = []

            def guarded(name: str, real: Any, crash: int = crash, seen: list[str] = seen) -> Any:
                def wrapper(*args: Any, **kwargs: Any) -> Any:
                    seen.append(name)
                    if len(seen) == crash:
                        raise Killed
                    return real(*args, **kwargs)

                return wrapper

            for module, name in calls:
                patch.setattr(module, name, guarded(name, getattr(module, name)))
            try:
                IO.save_checkpoint(state(2.0), file)
            except Killed:
                pass
            else:
                break
        states.append((seen[-1], IO.load_checkpoint(file)["turns"]))
    assert states == [("save", 1), ("fsync", 1), ("replace", 1), ("open", 2), ("fsync", 2)]


def test_half_a_save_leaves_the_old_checkpoint_and_is_in_nobodys_way(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "last.ckpt"
    IO.save_checkpoint(state(1.0), file)

    def half(_checkpoint: Any, out: Any) -> None:
        out.write(b"PK half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(CheckpointError, match="no space left"):
            IO.save_checkpoint(state(2.0), file)
    assert IO.load_checkpoint(file)["turns"] == 1
    assert list(tmp_path.glob("*.ckpt")) == [file]  # what is left behind is no candidate for resuming
    IO.save_checkpoint(state(3.0), file)
    assert IO.load_checkpoint(file)["turns"] == 3 and os.listdir(tmp_path) == ["last.ckpt"]


def test_what_is_synced_before_the_rename_is_the_whole_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    file, events = tmp_path / "last.ckpt", []

    def sync(_descriptor: int) -> None:
        events.append((torch.load(tmp_path / ".last.ckpt.tmp", weights_only=True)["turns"], file.exists()))

    monkeypatch.setattr(checkpoint_io, "flush_to_disk", sync)
    monkeypatch.setattr(checkpoint_io, "flush_directory", lambda folder: events.append((folder, file.exists())))
    IO.save_checkpoint(state(7.0), file)
    assert events == [(7, False), (tmp_path, True)]


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_file_that_asks_for_code_is_refused_and_nothing_is_executed(
    tmp_path: Path, weights_only: bool | None
) -> None:
    file, marker = tmp_path / "bad.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {}, "callbacks": Malicious(marker)}, file)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        IO.load_checkpoint(file, weights_only=weights_only)
    assert not marker.exists()
    torch.load(file, weights_only=False)["callbacks"].close()
    assert marker.exists()  # negative control: the file is as bad as it claims


def test_an_old_style_pickle_is_refused_too(tmp_path: Path) -> None:
    file, marker = tmp_path / "bad.ckpt", tmp_path / "executed"
    file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    with pytest.raises(Exception):  # noqa: B017  (torch's choice; what counts is that nothing runs)
        IO.load_checkpoint(file, weights_only=False)
    assert not marker.exists()


def test_a_truncated_file_is_an_error_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    IO.save_checkpoint(state(1.0), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="is damaged"):
        IO.load_checkpoint(file)


def test_tensors_come_to_the_cpu_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    IO.save_checkpoint({"w": torch.ones(2)}, file)
    assert IO.load_checkpoint(file)["w"].device.type == "cpu"
    assert IO.load_checkpoint(file, map_location="meta")["w"].device.type == "meta"


def test_a_checkpoint_can_be_removed(tmp_path: Path) -> None:
    IO.save_checkpoint(state(1.0), tmp_path / "turn=1.ckpt")
    IO.remove_checkpoint(tmp_path / "turn=1.ckpt")
    assert os.listdir(tmp_path) == []
