"""Promise 2 in its simple form: stopped anywhere, a run resumed ends as if it had never been stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from edit_runs import assert_same_state, curves, fit, ledger, results, saved_state
from tiny import LLAMA_SITE, WORDS, edit_rows, relative_difference, save_model, tiny_llama, word_tokenizer, write_stream

from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor, TurnCheckpoint, WarmUp
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import IncompatibleCheckpoint, SettingError
from stableedit_pl.run.files.directory import RunDirectoryError
from stableedit_pl.run.files.ledger import LedgerError
from stableedit_pl.run.stop_signals import StopRequested

# A process of its own that is struck once, as scripts/endurance/chaos.py does it many times.
SCRIPTS = Path(__file__).parents[2] / "scripts/endurance"
CHILD = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import chaos
import torch
from stableedit_pl.cli import command as cli
torch.set_num_threads(1)
point, how = sys.argv[1:3]
if point != "nowhere":
    chaos.arm(point, 4, how, call=2)
cli.main(sys.argv[3:])
"""


@pytest.fixture
def config(tmp_path: Path, llama_bf16_folder: str, stream_file: str, warmup_file: str) -> Path:
    """A bfloat16 model with warm-up, evaluation and monitoring: everything that has state."""
    settings = {
        "model": {"base_model": llama_bf16_folder, "sites": [LLAMA_SITE], "step_size": 1e-3, "ridge": 1.0},
        "data": {"path": stream_file, "warmup_path": warmup_file, "turn_size": 6, "micro_batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "WarmUp", "init_args": {"position": "q1"}},
                {"class_path": "EditEvaluation", "init_args": {"every_n_turns": 2, "sample_size": 12}},
                {"class_path": "StabilityMonitor"},
                {"class_path": "TurnCheckpoint", "init_args": {"every_n_turns": 2}},
            ],
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def stableedit(args: list[str], point: str = "nowhere", how: str = "nothing") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, point, how, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.fixture
def uninterrupted(tmp_path: Path, config: Path) -> Path:
    run = tmp_path / "uninterrupted"
    done = stableedit(["fit", "--config", str(config), "--run_dir", str(run)])
    assert done.returncode == 0, done.stderr
    return run


EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "exception": 1}
CASES = [
    ("capture", "SIGKILL"),
    ("planning", "SIGTERM"),
    ("planning", "exception"),
    ("commit", "SIGKILL"),
    ("commit", "SIGINT"),
    ("commit", "exception"),
    ("evaluation", "SIGKILL"),
    ("evaluation", "SIGTERM"),
]


def test_a_stopped_run_ends_bit_identical_after_resuming(tmp_path: Path, config: Path, uninterrupted: Path) -> None:
    expected_state, expected_curves = saved_state(uninterrupted), curves(uninterrupted)
    for point, how in CASES:
        run = tmp_path / f"{point}-{how}"
        fresh = ["fit", "--config", str(config), "--run_dir", str(run)]
        stopped = stableedit(fresh, point, how)
        assert stopped.returncode == EXIT_CODES[how], (point, how, stopped.stderr)
        if how in ("SIGTERM", "SIGINT"):
            assert "--ckpt_path last" in stopped.stderr and f"Stopped by {how}" in stopped.stderr
        resumed = stableedit([*fresh, "--ckpt_path", "last"])
        assert resumed.returncode == 0, (point, how, resumed.stderr)
        assert_same_state(saved_state(run), expected_state)
        assert (run / "edits.jsonl").read_text() == (uninterrupted / "edits.jsonl").read_text(), (point, how)
        assert without_seconds(results(run)) == without_seconds(results(uninterrupted)), (point, how)
        assert curves(run) == expected_curves, (point, how)
        assert (run / "config-2.yaml").is_file()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("folder", ["llama_folder", "llama_bf16_folder"])
def test_resuming_is_exact_in_every_precision(
    tmp_path: Path, request: pytest.FixtureRequest, stream_file: str, folder: str, precision: str
) -> None:
    base, data = request.getfixturevalue(folder), {"path": stream_file}
    fit(tmp_path / "whole", base, data, trainer={"precision": precision})
    fit(tmp_path / "run", base, data, trainer={"precision": precision, "max_steps": 2})
    fit(tmp_path / "run", base, data, trainer={"precision": precision}, ckpt_path="last")
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))
    assert saved_state(tmp_path / "run")[f"model.{LLAMA_SITE}.weight"].dtype == torch.float32


def test_a_run_killed_before_its_first_scheduled_checkpoint_resumes(
    tmp_path: Path, config: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"][-1]["init_args"]["every_n_turns"] = 100
    config.write_text(yaml.safe_dump(settings))
    arguments = ["fit", "--config", str(config), "--run_dir", str(run)]
    assert stableedit(arguments, "capture", "SIGKILL").returncode == -signal.SIGKILL
    assert [file.name for file in sorted((run / "checkpoints").iterdir())] == ["last.ckpt", "turn=0.ckpt"]
    resumed = stableedit([*arguments, "--ckpt_path", "last"])
    assert resumed.returncode == 0, resumed.stderr
    assert_same_state(saved_state(run), saved_state(uninterrupted))
    assert curves(run) == curves(uninterrupted)
    assert (run / "edits.jsonl").read_text() == (uninterrupted / "edits.jsonl").read_text()


def test_resuming_in_many_small_pieces_with_workers(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """One turn a piece, tokenized by worker processes, ends where one pass does."""
    data = {"path": stream_file, "num_workers": 2}
    callbacks = lambda: [TurnCheckpoint(every_n_turns=100), StabilityMonitor()]  # noqa: E731
    fit(tmp_path / "whole", llama_folder, {"path": stream_file}, callbacks=callbacks())
    for turn in range(1, 6):
        fit(
            tmp_path / "pieces",
            llama_folder,
            data,
            callbacks=callbacks(),
            trainer={"max_steps": turn},
            ckpt_path=None if turn == 1 else "last",
        )
    assert_same_state(saved_state(tmp_path / "pieces"), saved_state(tmp_path / "whole"))
    assert ledger(tmp_path / "pieces") == ledger(tmp_path / "whole")


def test_a_stream_that_grew_goes_on(tmp_path: Path, llama_folder: str) -> None:
    rows = edit_rows(32)
    short = write_stream(tmp_path / "short.jsonl", rows[:16])
    grown = write_stream(tmp_path / "grown.jsonl", rows)
    fit(tmp_path / "run", llama_folder, {"path": short})
    fit(tmp_path / "run", llama_folder, {"path": grown}, ckpt_path="last")
    fit(tmp_path / "whole", llama_folder, {"path": grown})
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [
        ({"ridge": 2.0}, {}, "ridge"),
        ({"normalization": "none"}, {}, "normalization"),
        ({"sites": ["model.layers.0.mlp.down_proj"]}, {}, "sites"),
        ({}, {"turn_size": 4}, "turn_size"),
        ({}, {"edit_order": "longest_first"}, "edit_order"),
        ({"bad_turns": "skip"}, {}, "bad_turns"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, llama_folder: str, stream_file: str, model: dict, data: dict, named: str
) -> None:
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, trainer={"max_steps": 2})
    before = {file.name: file.read_bytes() for file in (tmp_path / "run/checkpoints").iterdir()}
    with pytest.raises(IncompatibleCheckpoint, match=named):
        fit(tmp_path / "run", llama_folder, {"path": stream_file, **data}, model, ckpt_path="last")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run/checkpoints").iterdir()} == before


def test_micro_batches_may_change_unless_they_are_part_of_the_method(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    for reduction, refused in (("token_sum", False), ("micro_batch_mean", True)):
        run, model = tmp_path / reduction, {"loss_reduction": reduction}
        fit(run, llama_folder, {"path": stream_file}, model, trainer={"max_steps": 2})
        data = {"path": stream_file, "micro_batch_size": 8}
        if refused:
            with pytest.raises(IncompatibleCheckpoint, match=r"micro_batch_size +3 +8"):
                fit(run, llama_folder, data, model, ckpt_path="last")
        else:
            fit(run, llama_folder, data, model, ckpt_path="last")
            assert len(ledger(run)) == 33


def test_the_solver_of_the_inverse_root_may_change_and_changes_only_rounding(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    ends = {}
    for last in ("eigh", "quadrature"):
        run = tmp_path / last
        fit(run, llama_folder, {"path": stream_file}, {"whitening_solver": "eigh"}, trainer={"max_steps": 2})
        fit(run, llama_folder, {"path": stream_file}, {"whitening_solver": last}, ckpt_path="last")
        ends[last] = saved_state(run)[f"model.{LLAMA_SITE}.weight"]
    assert not torch.equal(ends["eigh"], ends["quadrature"])
    assert relative_difference(ends["quadrature"], ends["eigh"]) < 1e-6


def test_another_tokenizer_is_refused(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """The same weights with two words exchanged in the vocabulary."""
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, trainer={"max_steps": 2})
    words = [WORDS[1], WORDS[0], *WORDS[2:]]
    other = save_model(tmp_path / "other", tiny_llama(), word_tokenizer(words))
    with pytest.raises(IncompatibleCheckpoint, match="tokenizer"):
        fit(tmp_path / "run", other, {"path": stream_file}, ckpt_path="last")


def test_another_base_model_or_changed_rows_are_refused(
    tmp_path: Path, llama_folder: str, llama_bf16_folder: str, stream_file: str
) -> None:
    run = tmp_path / "run"
    fit(run, llama_folder, {"path": stream_file}, trainer={"max_steps": 2})
    with pytest.raises(IncompatibleCheckpoint, match="base_model"):
        fit(run, llama_bf16_folder, {"path": stream_file}, ckpt_path="last")
    rows = edit_rows(33)
    rows[3]["target"] = "w9"
    with pytest.raises(IncompatibleCheckpoint, match="digests"):
        fit(run, llama_folder, {"path": write_stream(tmp_path / "other.jsonl", rows)}, ckpt_path="last")


def test_a_run_directory_is_neither_overwritten_nor_started_over(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    run, data = tmp_path / "run", {"path": stream_file}
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        fit(run, llama_folder, data, ckpt_path="last")
    fit(run, llama_folder, data, trainer={"max_steps": 1})
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        fit(run, llama_folder, data)
    with pytest.raises(RunDirectoryError, match="A run is resumed where it was"):
        fit(tmp_path / "elsewhere", llama_folder, data, ckpt_path=str(run / "checkpoints/last.ckpt"))
    fit(run, llama_folder, data, trainer={"max_steps": 2, "overwrite": True})
    assert len(ledger(run)) == 16


def test_the_ledger_must_be_the_one_the_checkpoint_knows(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    run, data = tmp_path / "run", {"path": stream_file}
    fit(run, llama_folder, data, trainer={"max_steps": 2})
    lines = (run / "edits.jsonl").read_text().splitlines(keepends=True)
    (run / "edits.jsonl").write_text("".join(lines[:8]))
    with pytest.raises(LedgerError, match=r"has \d+ bytes, but the checkpoint knows 16 lines"):
        fit(run, llama_folder, data, ckpt_path="last")
    (run / "edits.jsonl").write_text("".join([*lines[:15], lines[14]]) + "x" * 100)
    with pytest.raises(LedgerError, match="line 16 is not the one the checkpoint knows"):
        fit(run, llama_folder, data, ckpt_path="last")
    (run / "edits.jsonl").write_text("".join(lines) + '{"id": "e0-16", "tur')  # half written when it was killed
    fit(run, llama_folder, data, ckpt_path="last")
    assert [line["id"] for line in ledger(run)] == [f"e0-{i}" for i in range(33)]


def test_a_checkpoint_holds_only_sites_and_moments(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    fit(
        tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[WarmUp(position="none"), EditEvaluation(2, 5)]
    )
    names = set(saved_state(tmp_path / "run"))
    parts = {f"statistics/{LLAMA_SITE}/{kind}/{part}" for kind in ("keys", "value_gradients") for part in ("count", "mean", "scatter")}  # fmt: skip  # noqa: E501
    assert names == {f"model.{LLAMA_SITE}.weight", *parts}
    assert json.dumps(results(tmp_path / "run"))
    assert not [name for name in os.listdir(tmp_path / "run/checkpoints") if name.endswith(".tmp")]


def test_captures_keep_their_precision_and_scores_may_change_theirs(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """Scores in bfloat16 are other scores, of the same edits."""
    data, run = {"path": stream_file}, tmp_path / "run"
    coarse = lambda precision: [EditEvaluation(2, 20, precision=precision)]  # noqa: E731
    plain = fit(tmp_path / "plain", llama_folder, data, callbacks=coarse(None))
    fit(run, llama_folder, data, callbacks=coarse(None), trainer={"max_steps": 3})
    with pytest.raises(IncompatibleCheckpoint, match=r"precision +32-true +bf16-mixed"):
        fit(run, llama_folder, data, trainer={"precision": "bf16-mixed"}, ckpt_path="last")
    seen: list[torch.dtype] = []
    real = LifelongEditor.answer

    def answer(self: LifelongEditor, *args: Any, **kwargs: Any) -> Any:
        with self.forward_context():
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LifelongEditor, "answer", answer)
        resumed = fit(run, llama_folder, data, callbacks=coarse("bfloat16"), ckpt_path="last")
    assert seen and set(seen) == {torch.bfloat16}
    assert_same_state(resumed.state_dict(), plain.state_dict())
    assert results(run)["measured"]["precision"] == "bfloat16"
    assert results(tmp_path / "plain")["measured"]["precision"] == "the trainer's, 32-true"
    with pytest.raises(SettingError, match=r"EditEvaluation.precision"):
        EditEvaluation(precision="int8")  # type: ignore[arg-type]


def test_slurms_warning_to_one_process_requeues_the_job_and_the_run_goes_on(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first moment on Lightning's own handler, which saves in the middle of a turn, is not there."""
    data, run, asked = {"path": stream_file}, tmp_path / "run", tmp_path / "asked"
    whole = fit(tmp_path / "whole", llama_folder, data)
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    job = {"JOB_ID": "12", "JOB_NAME": "edits", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for name, value in job.items():
            patch.setenv(f"SLURM_{name}", value)
        before = signal.getsignal(signal.SIGUSR1)

        class Warned(StabilityMonitor):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                """Before TurnCheckpoint's turn, after Lightning's."""
                assert signal.getsignal(signal.SIGUSR1) is before
                super().on_train_start(trainer, pl_module)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if batch.index == 2:
                    signal.raise_signal(signal.SIGUSR1)

        with pytest.raises(StopRequested, match="SIGUSR1 after turn 3"):
            fit(run, llama_folder, data, callbacks=[Warned()])
        assert asked.read_text() == "requeue 12\n" and signal.getsignal(signal.SIGUSR1) is before
        resumed = fit(run, llama_folder, data, ckpt_path="last")
    assert not list(run.glob("hpc_ckpt*"))
    assert_same_state(resumed.state_dict(), whole.state_dict())
