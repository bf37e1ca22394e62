"""A fork: a new run from another run's weights and statistics."""

from pathlib import Path

import pytest
import torch
from edit_runs import assert_same_state, fit, ledger, results, saved_state
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.errors import IncompatibleCheckpoint
from stableedit_pl.run.files.directory import RunDirectoryError


@pytest.fixture
def rows(tmp_path: Path) -> tuple[str, str]:
    """Two streams that belong together."""
    rows = edit_rows(32)
    first = write_stream(tmp_path / "first.jsonl", rows[:16])
    return first, write_stream(tmp_path / "second.jsonl", rows[16:])


def test_a_fork_with_the_same_settings_goes_on_where_the_run_was(
    tmp_path: Path, llama_folder: str, rows: tuple[str, str]
) -> None:
    """Streams A then B by a fork equal the stream A+B in one run, bit for bit."""
    first, second = rows
    fit(tmp_path / "first", llama_folder, {"path": first})
    fit(tmp_path / "fork", llama_folder, {"path": second}, trainer={"fork_from": str(tmp_path / "first")})
    whole = write_stream(tmp_path / "whole.jsonl", edit_rows(32))
    fit(tmp_path / "whole", llama_folder, {"path": whole})
    assert_same_state(saved_state(tmp_path / "fork"), saved_state(tmp_path / "whole"))
    assert [line["turn"] for line in ledger(tmp_path / "fork")] == [0] * 8 + [1] * 8
    found = results(tmp_path / "fork")
    assert found["edits"] == 16
    assert found["settings"]["forked_from"].endswith("first/checkpoints/last.ckpt (2 turns)")


def test_a_fork_may_change_the_method_and_resumes_as_itself(
    tmp_path: Path, llama_folder: str, rows: tuple[str, str]
) -> None:
    first, second = rows
    fit(tmp_path / "first", llama_folder, {"path": first})
    method = {"normalization": "standardize", "ridge": 2.0}
    fork = {"fork_from": str(tmp_path / "first")}
    fit(tmp_path / "whole", llama_folder, {"path": second, "turn_size": 5}, method, trainer=fork)
    fit(tmp_path / "parts", llama_folder, {"path": second, "turn_size": 5}, method, trainer={**fork, "max_steps": 2})
    fit(tmp_path / "parts", llama_folder, {"path": second, "turn_size": 5}, method, trainer=fork, ckpt_path="last")
    assert_same_state(saved_state(tmp_path / "parts"), saved_state(tmp_path / "whole"))
    assert (
        results(tmp_path / "parts")["settings"]["forked_from"] == results(tmp_path / "whole")["settings"]["forked_from"]
    )
    changed = saved_state(tmp_path / "whole")[f"model.{LLAMA_SITE}.weight"]
    assert not torch.equal(changed, saved_state(tmp_path / "first")[f"model.{LLAMA_SITE}.weight"])


def test_a_fork_of_another_model_or_into_its_own_directory_is_refused(
    tmp_path: Path, llama_folder: str, llama_bf16_folder: str, rows: tuple[str, str]
) -> None:
    first, second = rows
    fork = {"fork_from": str(tmp_path / "first")}
    with pytest.raises(RunDirectoryError, match="has no checkpoint"):
        (tmp_path / "first").mkdir()
        fit(tmp_path / "fork", llama_folder, {"path": second}, trainer=fork)
    fit(tmp_path / "first", llama_folder, {"path": first})
    with pytest.raises(IncompatibleCheckpoint, match="base_model"):
        fit(tmp_path / "fork", llama_bf16_folder, {"path": second}, trainer=fork)
    with pytest.raises(IncompatibleCheckpoint, match="sites") as raised:
        other = {"sites": ["model.layers.0.mlp.down_proj"]}
        fit(tmp_path / "fork", llama_folder, {"path": second}, other, trainer=fork)
    assert "base_model " not in str(raised.value) and "leave out --fork_from" in str(raised.value)
    with pytest.raises(IncompatibleCheckpoint, match="sites") as raised:
        fit(tmp_path / "first", llama_folder, {"path": first}, other, ckpt_path="last")
    assert "base_model " not in str(raised.value)
    with pytest.raises(RunDirectoryError, match=f"--fork_from {tmp_path}/none: there is no such file"):
        fit(tmp_path / "fork", llama_folder, {"path": second}, trainer={"fork_from": str(tmp_path / "none")})
    assert not (tmp_path / "fork").exists()
    with pytest.raises(RunDirectoryError, match="a fork needs a run_dir of its own"):
        fit(tmp_path / "first", llama_folder, {"path": second}, trainer={**fork, "overwrite": True})
    assert len(ledger(tmp_path / "first")) == 16, "nothing was removed"


def test_the_refusal_to_resume_names_the_way_to_fork(tmp_path: Path, llama_folder: str, rows: tuple[str, str]) -> None:
    first, _ = rows
    fit(tmp_path / "first", llama_folder, {"path": first}, trainer={"max_steps": 1})
    with pytest.raises(IncompatibleCheckpoint, match=r"ridge +1.0 +3.0[\s\S]*--fork_from RUN_DIR"):
        fit(tmp_path / "first", llama_folder, {"path": first}, {"ridge": 3.0}, ckpt_path="last")
