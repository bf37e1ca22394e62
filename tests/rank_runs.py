"""Edit runs of several processes for tests: started together, struck if need be, compared with one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import ledger, results, saved_state
from tiny import edit_rows, relative_difference, write_stream

from stableedit_pl.cli.command import main

ROOT = Path(__file__).parents[1]

# The command line with a blow in it: at a turn, a rank is struck in the middle of its capture.
FINAL_SCORES = 99
STRUCK = f"""
FINAL_SCORES = {FINAL_SCORES}
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from stableedit_pl import editor
from stableedit_pl.cli import command as cli
from stableedit_pl.model import shared_capture as shares
rank, turn, how = int(os.environ["STRUCK_RANK"]), int(os.environ["STRUCK_TURN"]), os.environ["STRUCK_HOW"]
step, capture = editor.LifelongEditor.training_step, shares.capture
mine = int(os.environ.get("LOCAL_RANK", "0")) == rank
now = -1
def training_step(self, batch, batch_idx):
    global now
    now = batch.index
    return step(self, batch, batch_idx)
def struck(*args):
    if mine and now == turn:
        if how == "bitflip":
            args[1][0].module.weight.data[0, 0] += 1e-3
        else:
            os.kill(os.getpid(), getattr(signal, how))
    return capture(*args)
editor.LifelongEditor.training_step, shares.capture = training_step, struck
from stableedit_pl.callbacks import edit_evaluation
scores = edit_evaluation.score_base_and_retained
def struck_late(*args):
    if mine and turn == FINAL_SCORES:
        os.kill(os.getpid(), getattr(signal, how))
    return scores(*args)
edit_evaluation.score_base_and_retained = struck_late
cli.main()
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def rank_settings(
    model: dict[str, Any], path: Path, warmup_path: str, evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """33 edits in turns of 8: the fifth has one edit, fewer than there are ranks. Warm-up, evaluation, curves."""
    return {
        "model": {"ridge": 1.0, **model},
        "data": {
            "path": write_stream(path, edit_rows(33)),
            "warmup_path": warmup_path,
            "turn_size": 8,
            "micro_batch_size": 3,
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "WarmUp", "init_args": {"position": "q1"}},
                {
                    "class_path": "EditEvaluation",
                    "init_args": {"every_n_turns": 2, "sample_size": 13, **(evaluation or {})},
                },
                {"class_path": "StabilityMonitor"},
                {"class_path": "RankAgreement", "init_args": {"every_n_turns": 1}},
                {"class_path": "TurnCheckpoint", "init_args": {"every_n_turns": 2, "keep": 10}},
            ],
        },
    }


def arguments(config: Path, run: Path, *more: str) -> list[str]:
    return ["fit", f"--config={config}", f"--run_dir={run}", *more]


def ddp(processes: int) -> list[str]:
    return [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]


def together(given: list[str], script: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; everything it starts has ended when this returns, or the pipes would be open still."""
    command = [sys.executable, *(["-m", "stableedit_pl"] if script is None else [str(script)]), *given]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=120, check=False
    )


def alone(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stableedit"])
    main(given)


def assert_same_run(run: Path, expected: Path, base: dict[str, torch.Tensor]) -> None:
    """Weights to rounding; edits, positions and scores exactly."""
    here, there = saved_state(run), saved_state(expected)
    assert here.keys() == there.keys()
    for name in base:
        assert relative_difference(here[name] - base[name], there[name] - base[name]) <= 1e-5, name
    assert [(line["id"], line["turn"]) for line in ledger(run)] == [(x["id"], x["turn"]) for x in ledger(expected)]
    for line, other in zip(ledger(run), ledger(expected), strict=True):
        for measured in ("loss_before", "loss_after", "at_edit", "known_before"):
            assert line[measured] == pytest.approx(other[measured], rel=1e-3, abs=1e-5), (line["id"], measured)
    for kind in ("base", "at_edit", "retained"):
        assert results(run)[kind] == pytest.approx(results(expected)[kind]), kind
    for kind in ("edits", "turns", "warmup_turns", "known_before"):
        assert results(run)[kind] == results(expected)[kind], kind


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def weights_at(run: Path, turn: int) -> dict[str, torch.Tensor]:
    state = torch.load(run / f"checkpoints/turn={turn}.ckpt", weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("model.")}
