"""Checkpoint files that are damaged, malicious, or do not fit on the disk."""

import logging
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import PASSES, assert_same_state, fit, ledger, results, saved_state

from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor, TurnCheckpoint
from stableedit_pl.cli.export import load_run
from stableedit_pl.run.files.checkpoint_io import CheckpointError, read_checkpoint, tensor_bytes
from stableedit_pl.run.files.directory import RunDirectoryError
from stableedit_pl.run.files.integrity import damage


def every_turn() -> list[Any]:
    return [TurnCheckpoint(every_n_turns=1, keep=2), EditEvaluation(2, 10), StabilityMonitor()]


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(bytes(content))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def stopped(tmp_path: Path, llama_folder: str, stream_file: str) -> Path:
    """A run of five turns stopped after three, with checkpoints of turns 2 and 3."""
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=every_turn(), trainer={"max_steps": 3})
    return tmp_path / "run"


def test_a_flipped_byte_is_found_wherever_it_matters(stopped: Path, tmp_path: Path) -> None:
    """Anywhere in the file: either it is found, or what is loaded is what was written."""
    whole = stopped / "checkpoints/last.ckpt"
    expected = read_checkpoint(whole)
    found = 0
    size = whole.stat().st_size
    for offset in random.Random(0).sample(range(size), 300):
        copy = tmp_path / "copy.ckpt"
        shutil.copyfile(whole, copy)
        flip(copy, offset)
        try:
            loaded = read_checkpoint(copy)
        except CheckpointError:
            found += 1
        else:
            assert same(loaded, expected), offset
    assert found > 150, "most of the file is content"


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_said(
    stopped: Path, tmp_path: Path, llama_folder: str, stream_file: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    last = stopped / "checkpoints/last.ckpt"
    if kind == "flipped":
        weight = saved_state(stopped)["model.model.layers.1.mlp.down_proj.weight"].numpy().tobytes()
        flip(last, last.read_bytes().index(weight) + 100)
    else:
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 if kind == "truncated" else 0])
    with caplog.at_level(logging.WARNING):
        fit(stopped, llama_folder, {"path": stream_file}, callbacks=every_turn(), ckpt_path="last")
    assert f"{last} is damaged" in caplog.text and "Trying the one before it" in caplog.text
    fit(tmp_path / "whole", llama_folder, {"path": stream_file}, callbacks=every_turn())
    assert_same_state(saved_state(stopped), saved_state(tmp_path / "whole"))
    assert ledger(stopped) == ledger(tmp_path / "whole")
    assert results(stopped)["retained"] == results(tmp_path / "whole")["retained"]


def test_with_no_whole_checkpoint_the_run_does_not_start_over(
    stopped: Path, llama_folder: str, stream_file: str
) -> None:
    for file in (stopped / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    before = (stopped / "edits.jsonl").read_text()
    with pytest.raises(
        RunDirectoryError, match=r"every checkpoint in .* is damaged .* nothing to resume.*Put back a copy"
    ):
        fit(stopped, llama_folder, {"path": stream_file}, ckpt_path="last")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        fit(stopped, llama_folder, {"path": stream_file})
    with pytest.raises(RunDirectoryError, match=r"turn=3.ckpt is damaged: it is no whole archive"):
        fit(stopped, llama_folder, {"path": stream_file}, ckpt_path=str(stopped / "checkpoints/turn=3.ckpt"))
    assert (stopped / "edits.jsonl").read_text() == before


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.write_text, (self.proof, "executed"))


def test_a_malicious_checkpoint_is_refused_and_nothing_is_executed(
    stopped: Path, tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    proof, last = tmp_path / "proof", stopped / "checkpoints/last.ckpt"
    checkpoint = read_checkpoint(last)
    torch.save({**checkpoint, "callbacks": {"x": Malicious(proof)}}, last)
    assert damage(last) is None
    for attempt in (
        lambda: fit(stopped, llama_folder, {"path": stream_file}, ckpt_path="last"),
        lambda: load_run(stopped),
    ):
        with pytest.raises(CheckpointError, match="nothing in it was executed"):
            attempt()
    assert not proof.exists()
    torch.load(last, weights_only=False)  # the control: the file is dangerous to those who execute it
    assert proof.exists()


def test_a_checkpoint_is_hardly_larger_than_its_tensors(tmp_path: Path) -> None:
    """At the demo's size; a tiny model's file is all bookkeeping."""
    from stableedit_pl.callbacks import WarmUp

    data = {"path": "demo", "warmup_path": "demo", "turn_size": 20, "micro_batch_size": 20}
    model = {"sites": ["model.layers.1.mlp.down_proj"], "model_dtype": "float32", "step_size": 4e-4, "ridge": 10.0}
    callbacks = [WarmUp(mode="statistics_only"), EditEvaluation(None, 5, final=False), StabilityMonitor()]
    fit(tmp_path / "run", "demo", data, model, callbacks=callbacks, trainer={"max_steps": 7})
    file = tmp_path / "run/checkpoints/last.ckpt"
    assert file.stat().st_size <= 1.05 * tensor_bytes(read_checkpoint(file))


FULL_DISK = """
import resource, sys
import torch
torch.set_num_threads(1)
from stableedit_pl import callbacks
from stableedit_pl.cli import command as cli
from stableedit_pl.callbacks import TurnCheckpoint
limit = int(sys.argv[1])
real = TurnCheckpoint._save
def save(self, trainer):
    if trainer.global_step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    real(self, trainer)
TurnCheckpoint._save = save
cli.main(sys.argv[2:])
"""


def test_a_full_disk_stops_at_a_turn_boundary_with_the_checkpoint_before_intact(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """From turn 3 on no file may grow beyond a limit that a checkpoint does not fit in."""
    run = tmp_path / "run"
    arguments = [
        "fit",
        f"--run_dir={run}",
        f"--model.base_model={llama_folder}",
        '--model.sites=["model.layers.1.mlp.down_proj"]',
        "--model.step_size=1e-3",
        "--model.ridge=1.0",
        f"--model.passes={PASSES}",
        f"--data.path={stream_file}",
        "--data.turn_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=TurnCheckpoint",
        "--trainer.callbacks.every_n_turns=1",
    ]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FULL_DISK, "9000", *arguments]
    full = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert full.returncode == 1, full.stderr
    assert "cannot write" in full.stderr and "It needs about" in full.stderr and "Traceback" not in full.stderr
    names = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "turn=1.ckpt", "turn=2.ckpt"]
    assert all(damage(file) is None for file in (run / "checkpoints").iterdir())
    again = [sys.executable, "-m", "stableedit_pl", *arguments, "--ckpt_path=last"]
    assert subprocess.run(again, capture_output=True, timeout=120, check=False).returncode == 0
    fit(tmp_path / "whole", llama_folder, {"path": stream_file, "micro_batch_size": 10})
    assert_same_state(saved_state(run), saved_state(tmp_path / "whole"))
