"""``stableedit verify`` finds what is wrong with a run directory, and nothing where nothing is."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edit_runs import fit
from safetensors.torch import load_file, save_file
from tiny import LLAMA_SITE

from stableedit_pl.callbacks import TurnCheckpoint
from stableedit_pl.cli.command import main
from stableedit_pl.cli.export import export_run
from stableedit_pl.cli.verify import verify_run
from stableedit_pl.errors import IncompatibleCheckpoint
from stableedit_pl.run.files.directory import RunDirectory, RunDirectoryError
from stableedit_pl.run.files.opening import Opening


@pytest.fixture
def run(tmp_path: Path, llama_folder: str, stream_file: str) -> Path:
    """A finished run."""
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[TurnCheckpoint(every_n_turns=2)])
    return tmp_path / "run"


def test_a_whole_run_passes_every_check(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = verify_run(str(run))
    assert verdict.problems == []
    assert len(verdict.passed) == 12
    monkeypatch.setattr(sys, "argv", ["stableedit"])
    main(["verify", f"--run={run}"])
    assert "33 lines, the running hash holds" in capsys.readouterr().out


def test_another_base_model_under_the_same_name_is_a_problem(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """A weight that is no site changes: the run neither resumes nor is exported, and verify says so."""
    base = shutil.copytree(llama_folder, tmp_path / "base")
    fit(tmp_path / "run", str(base), {"path": stream_file}, trainer={"max_steps": 2})
    assert "its weights are those that the run began with" in verify_run(str(tmp_path / "run")).passed[-1]
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    problems = verify_run(str(tmp_path / "run")).problems
    assert len(problems) == 1 and "are not those that the run began with" in problems[0]
    with pytest.raises(IncompatibleCheckpoint, match=r"base_weights .*"):
        fit(tmp_path / "run", str(base), {"path": stream_file}, ckpt_path="last")
    with pytest.raises(IncompatibleCheckpoint, match="base_weights"):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    shutil.rmtree(base)
    assert verify_run(str(tmp_path / "run")).problems == []


def test_a_killed_run_passes_and_says_what_resuming_will_do(run: Path) -> None:
    """The newest checkpoint gone, as if the process had been killed before it was written."""
    for name in ("last.ckpt", "turn=5.ckpt"):
        (run / "checkpoints" / name).unlink()
    verdict = verify_run(str(run))
    assert verdict.problems == []
    assert any("1 more belong to turns that resuming applies again" in sentence for sentence in verdict.passed)
    assert any("results.json is of turn 5; the run has gone on since" in sentence for sentence in verdict.passed)


def change_line(run: Path) -> None:
    file = run / "edits.jsonl"
    file.write_text(file.read_text().replace('"e0-7"', '"e0-8"', 1))


def drop_last_line(run: Path) -> None:
    file = run / "edits.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def flip_checkpoint(run: Path) -> None:
    file = run / "checkpoints/turn=4.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def change_statistics(run: Path) -> None:
    file = run / "statistics.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("value_gradients/mean"))
    save_file({**tensors, name: tensors[name] + 1}, file, {"turns": "5"})


def poison_statistics(run: Path) -> None:
    file = run / "statistics.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("value_gradients/mean"))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file, {"turns": "5"})


def change_results(run: Path) -> None:
    file = run / "results.json"
    found = json.loads(file.read_text())
    found["edits"], found["at_edit"]["efficacy"] = 34, 0.99
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (change_line, "line 8: its hash does not follow"),
        (drop_last_line, "the checkpoint knows 33 lines, but edits.jsonl has 32"),
        (flip_checkpoint, "turn=4.ckpt is damaged"),
        (change_statistics, "differs from the moments in the checkpoint"),
        (poison_statistics, "not all numbers are finite"),
        (change_results, "results.json says 34 edits, the ledger has 33"),
        (change_results, "results.json says at-edit efficacy 0.99"),
        (lambda run: (run / "results.json").write_text("{"), "results.json cannot be read"),
        (lambda run: (run / "statistics.safetensors").write_bytes(b"x"), "statistics.safetensors cannot be read"),
        (lambda run: (run / "edits.jsonl").unlink(), "ledger:"),
        (lambda run: [f.write_bytes(b"") for f in (run / "checkpoints").iterdir()], "there is no whole checkpoint"),
    ],
)
def test_harm_is_found_and_the_exit_code_says_so(
    run: Path,
    harm: Callable[[Path], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harm(run)
    monkeypatch.setattr(sys, "argv", ["stableedit"])
    with pytest.raises(SystemExit) as stopped:
        main(["verify", f"--run={run}"])
    assert stopped.value.code == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert any(said in line for line in problems), problems


def test_others_may_read_beside_a_living_run_but_not_write(
    run: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line of the ledger half written, as it is for a moment."""
    monkeypatch.setattr(sys, "argv", ["stableedit"])
    with (run / "edits.jsonl").open("a") as file:
        file.write('{"id": "e0-33", "tur')
    asked = [f"--model.base_model={llama_folder}", f"--model.sites={LLAMA_SITE}", "--model.step_size=1e-3"]
    asked += [
        "--model.ridge=1",
        "--model.passes=4",
        f"--data.path={stream_file}",
        "--data.turn_size=8",
        "--data.micro_batch_size=3",
    ]
    asked += [f"--run_dir={run}", "--trainer.accelerator=cpu", "--ckpt_path=last"]
    with Opening(RunDirectory(run), overwrite=False) as opening:
        opening.first_turn()
        main(["verify", f"--run={run}"])
        main(["export", f"--run={run}", f"--out={run.parent / 'out'}"])
        main(["predict", *asked])
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *asked])
        assert stopped.value.code == 1 and "is in use by another run" in capsys.readouterr().err
        assert RunDirectory(run).lock.exists()
    main(["fit", *asked])
    assert verify_run(str(run)).problems == []


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run"):
        verify_run(str(tmp_path))
