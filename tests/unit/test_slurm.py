"""What SLURM is asked, and what is said of its answer."""

from pathlib import Path

import pytest

from stableedit_pl.run import slurm


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes down what it is asked, and answers as told."""
    asked = tmp_path / "asked"
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n[ -z "$REFUSAL" ] || {{ echo "$REFUSAL" >&2; exit 1; }}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "REFUSAL"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_a_job_is_requeued_by_its_number(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert slurm.requeue() == "SLURM has job 77 in its queue again"
    assert scontrol.read_text() == "requeue 77\n"


def test_an_array_task_is_requeued_alone(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_ID", "81"), ("SLURM_ARRAY_JOB_ID", "77"), ("SLURM_ARRAY_TASK_ID", "4")):
        monkeypatch.setenv(name, value)
    assert "job 77_4" in slurm.requeue() and scontrol.read_text() == "requeue 77_4\n"


def test_a_refusal_is_passed_on(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("REFUSAL", "requeue is disabled for job 77")
    assert slurm.requeue() == (
        "SLURM did not requeue job 77 (scontrol: requeue is disabled for job 77); submit it again, it goes on from here"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert "did not requeue job 77 (scontrol: " in slurm.requeue()
