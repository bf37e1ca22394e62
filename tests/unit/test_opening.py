"""A run directory is one run's at a time, and a refused start leaves it as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stableedit_pl.run.files.directory import RunDirectory, RunDirectoryError
from stableedit_pl.run.files.lock import RunLock
from stableedit_pl.run.files.opening import Opening

HOLDER = """
import os, sys, time
from stableedit_pl.run.files.directory import RunDirectory
from stableedit_pl.run.files.opening import Opening
with Opening(RunDirectory(sys.argv[1]), overwrite=True):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with Opening(run, overwrite=False):
        with pytest.raises(RunDirectoryError) as raised, Opening(RunDirectory(tmp_path / "run"), overwrite=True):
            pass
        said = str(raised.value)
        assert f"{run.path} is in use by another run (process {os.getpid()} on" in said and "--run_dir" in said
        assert run.lock.exists(), "the refused start left the first one's lock alone"
        with pytest.raises(RunDirectoryError):
            Opening(run, overwrite=False).__enter__()
    with Opening(run, overwrite=False) as opening:
        opening.first_turn()
    assert not run.lock.exists()


def test_a_killed_owner_leaves_no_lock_behind_nor_do_its_workers(tmp_path: Path) -> None:
    """Its forked workers live on for a while, and must not keep what they never asked for."""
    run = RunDirectory(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunDirectoryError, match=f"process {holder.pid} on"), Opening(run, overwrite=False):
            pass
        holder.kill()
        holder.wait()
        assert run.lock.exists()
        with Opening(run, overwrite=False):
            assert f"process {os.getpid()} on" in run.lock.read_text()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_place_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = RunLock(RunDirectory(tmp_path))
    monkeypatch.setattr(lock._lock, "acquire", lambda: (_ for _ in ()).throw(OSError(37, "No locks available")))
    lock.acquire()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    lock.release()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("existing", [True, False])
def test_a_refused_start_leaves_nothing(tmp_path: Path, existing: bool) -> None:
    run = RunDirectory(tmp_path / "a/run")
    if existing:
        run.path.mkdir(parents=True)
        run.config.write_text("before")
        (run.path / "notes.txt").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(OSError), Opening(run, overwrite=False) as opening:
        assert opening.checkpoint(None) is None
        opening.begin()
        run.next_config().write_text("after")
        (run.path / "events.out.tfevents.1.host").write_text("after")
        run.checkpoints.mkdir()
        (run.checkpoints / "turn=0.ckpt").write_text("after")
        raise OSError
    assert names(tmp_path) == before
    assert not existing or run.config.read_text() == "before"


def test_a_run_under_way_stays_whatever_happens(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(OSError), Opening(run, overwrite=False) as opening:
        opening.begin()
        run.config.write_text("new")
        opening.first_turn()
        raise OSError
    assert names(tmp_path) == {"run", "run/config.yaml"}


def test_a_replaced_run_goes_when_the_new_one_begins_and_not_before(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.ledger.write_text("old")
    run.config.write_text("old")
    with pytest.raises(OSError), Opening(run, overwrite=True) as opening:
        opening.checkpoint(None)
        raise OSError
    assert names(tmp_path) == {"edits.jsonl", "config.yaml"}
    with Opening(run, overwrite=True) as opening:
        opening.checkpoint(None)
        opening.begin()
        assert names(tmp_path) == {".lock"}


def test_a_new_run_over_an_old_one_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.ledger.write_text("old")
    with pytest.raises(RunDirectoryError, match="already holds a run"), Opening(run, overwrite=False) as opening:
        opening.checkpoint(None)
    assert names(tmp_path) == {"edits.jsonl"}
