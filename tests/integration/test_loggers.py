"""Loggers and monitors of Lightning's own in an edit run, stopped and resumed."""

import csv
from pathlib import Path

import pytest
from edit_runs import fit
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.loggers import CSVLogger


def points(run: Path) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` without those of wall-clock time."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("cost/")} for row in csv.DictReader(file)]
    return [row for row in rows if len(row) > 1]


def test_no_logger_begins_before_all_is_checked(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """One of a server would open a page for every refused start."""
    for wrong in ({"path": "/nowhere.jsonl"}, {"path": stream_file, "warmup_path": stream_file}):
        with pytest.raises(ValueError):
            fit(tmp_path / "run", llama_folder, wrong, trainer={"logger": CSVLogger(tmp_path / "logs")})
        assert not (tmp_path / "logs").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", [{}, {"step_size": None, "relative_step": 0.05}], ids=["absolute", "relative"])
def test_csv_and_learning_rate_of_a_resumed_run_are_those_of_an_unbroken_one(
    tmp_path: Path, llama_folder: str, stream_file: str, model: dict
) -> None:
    def run(name: str, **more: object) -> None:
        logger = CSVLogger(tmp_path / name, name="", version="")
        callbacks = [LearningRateMonitor(), Timer()]
        trainer = {"logger": logger, **({"max_steps": more.pop("turns")} if "turns" in more else {})}
        fit(tmp_path / name, llama_folder, {"path": stream_file}, model, callbacks=callbacks, trainer=trainer, **more)

    run("whole")
    run("parts", turns=2)
    beyond = tmp_path / "parts/metrics.csv"
    beyond.write_text(beyond.read_text() + beyond.read_text().splitlines()[-1] + "\n")  # as after a kill in turn 2
    run("parts", ckpt_path="last")
    whole = points(tmp_path / "whole")
    assert points(tmp_path / "parts") == whole
    rates = [float(row["lr-ClosedFormEdit"]) for row in whole if "lr-ClosedFormEdit" in row]
    assert len(rates) >= 5 and set(rates) == {0.05 if model else 1e-3}
