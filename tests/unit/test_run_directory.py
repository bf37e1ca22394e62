"""The run directory: what starts, what resumes, what is refused, and files that are whole or absent."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from stableedit_pl.run.files import directory as run_directory
from stableedit_pl.run.files.directory import RunDirectory, RunDirectoryError, write_atomically


class Killed(BaseException):
    """Nothing on the way up may handle it, as with a real kill."""


def crash_before(call: int, monkeypatch: Any) -> list[str]:
    """Raise at the ``call``-th request to the operating system that makes a write durable; returns the requests."""
    seen: list[str] = []

    def guarded(name: str, real: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == call:
                raise Killed(name)
            return real(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "open"):
        monkeypatch.setattr(os, name, guarded(name, getattr(os, name)))
    return seen


def started(path: Path) -> RunDirectory:
    """A directory that looks like a finished run."""
    run = RunDirectory(path)
    run.checkpoints.mkdir(parents=True)
    for file in (run.config, run.last_checkpoint, run.statistics, run.ledger, run.results, run.predictions):
        file.write_text("old")
    for file in (run.last_checkpoint, run.checkpoints / "turn=5.ckpt"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data", "old")
    (path / "config-2.yaml").write_text("old")
    (path / "events.out.tfevents.1.host").write_text("old")
    return run


def start(run: RunDirectory, resuming_from: Path | None, overwrite: bool) -> None:
    """What a start does to the directory, in its order."""
    run.refuse(resuming_from, overwrite)
    run.make()
    if resuming_from is None and run.holds_run():
        run.clear()


# ---- names


def test_everything_lies_directly_in_the_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    assert {run.config.name, run.statistics.name, run.ledger.name, run.results.name, run.predictions.name} == {
        "config.yaml",
        "statistics.safetensors",
        "edits.jsonl",
        "results.json",
        "predictions.jsonl",
    }
    assert run.last_checkpoint == run.path / "checkpoints" / "last.ckpt"
    assert not run.path.exists()  # asking for names makes nothing


def test_answers_are_named_for_whose_they_are(tmp_path: Path) -> None:
    """Asking the base model does not overwrite what the edited one said."""
    run = started(tmp_path)
    asked: list[str | Path | None] = ["last", run.last_checkpoint, run.checkpoints / "turn=5.ckpt", None]
    names = [run.predictions_of(ckpt_path).name for ckpt_path in asked]
    assert names == ["predictions.jsonl"] * 2 + ["predictions-turn=5.jsonl", "predictions-base.jsonl"]
    for name in names:
        (tmp_path / name).write_text("old")
    run.clear()
    assert not list(tmp_path.glob("predictions*"))


def test_a_tilde_is_the_home_directory(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs/a").path == tmp_path / "runs" / "a"


def test_configs_of_resumed_runs_are_numbered(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for name in ("config.yaml", "config-2.yaml", "config-3.yaml"):
        assert run.next_config().name == name
        run.next_config().write_text("x")


# ---- starting


def test_a_new_run_makes_its_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    assert not run.holds_run()
    start(run, None, overwrite=False)
    assert run.path.is_dir() and list(run.path.iterdir()) == []


@pytest.mark.parametrize("file", ["edits.jsonl", "checkpoints/last.ckpt"])
def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, file: str) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("old")
    with pytest.raises(RunDirectoryError) as raised:
        start(run, None, overwrite=False)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path} already holds a run.")
    assert all(way in message for way in ("--ckpt_path last", "another --run_dir", "--overwrite true"))
    assert (tmp_path / file).read_text() == "old"


def test_a_run_that_failed_before_its_first_turn_is_no_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text("old")
    run.ledger.write_text("")
    assert not run.holds_run()
    start(run, None, overwrite=False)
    assert run.config.read_text() == "old", "without --overwrite nothing is removed"
    assert run.next_config().name == "config-2.yaml"


@pytest.mark.parametrize("name", ["config-mine.yaml", "checkpoints/epoch=3.ckpt"])
def test_files_of_a_directory_without_a_run_are_not_removed_unasked(tmp_path: Path, name: str) -> None:
    """``--run_dir .`` in a project that has checkpoints of its own, or a configuration put beside its run."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with contextlib.suppress(RunDirectoryError):  # refusing is as good
        start(RunDirectory(tmp_path), None, overwrite=False)
    assert (tmp_path / name).exists()


def test_other_peoples_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    start(RunDirectory(tmp_path), None, overwrite=False)
    start(RunDirectory(tmp_path), None, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_removes_the_run_and_only_the_run(tmp_path: Path) -> None:
    run = started(tmp_path)
    for name in ("notes.txt", "edits.jsonl.bak", "figure.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.yaml").write_text("mine")
    start(run, None, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "edits.jsonl.bak", "figure.png", "exported"}
    assert (tmp_path / "exported" / "config.yaml").read_text() == "mine"
    assert not run.holds_run()


def test_overwrite_leaves_checkpoints_that_no_run_wrote(tmp_path: Path) -> None:
    run = started(tmp_path)
    (run.checkpoints / "epoch=3.ckpt").write_text("mine")
    start(run, None, overwrite=True)
    assert (run.checkpoints / "epoch=3.ckpt").exists()


@pytest.mark.parametrize("name", ["config-mine.yaml", "config_for_paper.yaml", "configuration.yaml"])
def test_overwrite_leaves_configurations_that_no_run_wrote(tmp_path: Path, name: str) -> None:
    run = started(tmp_path)
    (tmp_path / name).write_text("mine")
    start(run, None, overwrite=True)
    assert (tmp_path / name).exists()


def test_overwrite_needs_a_run_to_overwrite(tmp_path: Path) -> None:
    start(RunDirectory(tmp_path / "new"), None, overwrite=True)
    assert (tmp_path / "new").is_dir()


# ---- resuming


def test_no_checkpoint_is_asked_for(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).checkpoint(None) is None


def test_last_is_the_runs_own_last_checkpoint(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert run.checkpoint("last") == run.last_checkpoint


def test_last_without_a_checkpoint_is_refused_rather_than_starting_over(tmp_path: Path) -> None:
    run = started(tmp_path)
    for file in run.checkpoints.iterdir():
        file.unlink()
    with pytest.raises(RunDirectoryError) as raised:
        run.checkpoint("last")
    message = str(raised.value)
    assert str(tmp_path) in message and "nothing to resume" in message
    assert "Check --run_dir" in message and "--overwrite true" in message


def test_a_directory_called_last_ckpt_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        RunDirectory(tmp_path).checkpoint("last")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_that_file(tmp_path: Path, kind: Any) -> None:
    run = started(tmp_path)
    assert run.checkpoint(kind(run.checkpoints / "turn=5.ckpt")) == run.checkpoints / "turn=5.ckpt"


@pytest.mark.parametrize("missing", ["checkpoints/turn=6.ckpt", "checkpoints", "best", "hpc"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, missing: str) -> None:
    run = started(tmp_path)
    with pytest.raises(RunDirectoryError) as raised:
        run.checkpoint(tmp_path / missing)
    assert ("it is a directory" if missing == "checkpoints" else "there is no such file") in str(raised.value)
    assert "has turn=5.ckpt" in str(raised.value)


@pytest.mark.parametrize(
    ("purpose", "said"),
    [
        (
            run_directory.ASK,
            "--ckpt_path last: {run} does not exist, so there is no edited model to ask. Check --run_dir",
        ),
        (run_directory.EXPORT, "--run {run}: does not exist, so there is nothing to export. Give the directory"),
        (
            run_directory.FORK,
            "--fork_from {run}: does not exist, so there is nothing to start from. Give the directory",
        ),
    ],
    ids=["ask", "export", "fork"],
)
def test_each_verb_speaks_of_what_it_was_asked(tmp_path: Path, purpose: Any, said: str) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(RunDirectoryError) as raised:
        run.checkpoint("last", purpose)
    assert str(raised.value).startswith(said.format(run=run.path))
    run = started(tmp_path / "run")
    for file in run.checkpoints.iterdir():
        file.write_text("damaged")
    with pytest.raises(RunDirectoryError, match="every checkpoint") as raised:
        run.checkpoint("last", purpose)
    assert "--overwrite" not in str(raised.value) and "resume" not in str(raised.value)
    with pytest.raises(RunDirectoryError) as raised:
        run.checkpoint(tmp_path / "none.ckpt", purpose)
    option = "--fork_from" if purpose is run_directory.FORK else "--ckpt_path"
    assert str(raised.value).startswith(f"{option} {tmp_path}/none.ckpt: there is no such file.")


@pytest.mark.parametrize("overwrite", [False, True])
def test_resuming_keeps_everything(tmp_path: Path, overwrite: bool) -> None:
    run = started(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    start(run, run.last_checkpoint, overwrite)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_resuming_elsewhere_is_refused_naming_both_places(tmp_path: Path) -> None:
    old = started(tmp_path / "old")
    with pytest.raises(RunDirectoryError) as raised:
        start(RunDirectory(tmp_path / "new"), old.last_checkpoint, overwrite=False)
    assert str(tmp_path / "old") in str(raised.value) and f"--run_dir is {tmp_path / 'new'}" in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_the_same_place_by_another_name_is_the_same_place(tmp_path: Path, monkeypatch: Any) -> None:
    run = started(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    start(RunDirectory(tmp_path / "link"), run.last_checkpoint, overwrite=False)
    monkeypatch.chdir(tmp_path)
    start(RunDirectory("run"), Path("run/checkpoints/last.ckpt"), overwrite=False)


# ---- atomic files


@pytest.mark.parametrize("content", ["text: ünï\n", b"\x00bytes\xff", ""])
def test_content_is_written(tmp_path: Path, content: str | bytes) -> None:
    write_atomically(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_crash_before_any_call_leaves_the_old_content_or_the_new(tmp_path: Path, monkeypatch: Any) -> None:
    file, states = tmp_path / "f", []
    for call in range(1, 10):
        file.write_text("old")
        with monkeypatch.context() as patch:
            requests = crash_before(call, patch)
            try:
                write_atomically(file, "new")
            except Killed:
                states.append((requests[-1], file.read_text()))
            else:
                break
    assert states == [("fsync", "old"), ("replace", "old"), ("open", "new"), ("fsync", "new")]
    write_atomically(file, "newer")  # what a crash left behind is in nobody's way
    assert file.read_text() == "newer" and [f.name for f in tmp_path.iterdir()] == ["f"]


def test_what_is_synced_is_the_content(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(run_directory, "flush_to_disk", lambda _: synced.append((tmp_path / ".f.tmp").read_bytes()))
    write_atomically(tmp_path / "f", "new")
    assert synced == [b"new"]


def test_a_directory_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: Any) -> None:
    run_directory.flush_directory(tmp_path / "missing")
    closed = []
    close = os.close
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("not supported")))
    monkeypatch.setattr(os, "close", lambda descriptor: closed.append(close(descriptor)))
    run_directory.flush_directory(tmp_path)
    assert len(closed) == 1  # and the descriptor does not leak
