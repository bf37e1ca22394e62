"""What loggers have written stays when a run is resumed."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from stableedit_pl.errors import SettingError
from stableedit_pl.run.logger_history import LoggerHistories


class Remote(Logger):
    """Has a name for every run, as loggers of a server do."""

    def __init__(self, version: str | None) -> None:
        super().__init__()
        self._given = version

    name = "remote"

    @property
    def version(self) -> str | None:
        return self._given

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(path: Path, steps: range, **options: Any) -> tuple[CSVLogger, dict[str, Any]]:
    """A logger with points at these steps, its history after turn 3, and two points that are not saved yet."""
    logger, history = CSVLogger(path, **options), {}
    histories = LoggerHistories([logger])
    for step in steps:
        logger.log_metrics({"a": step} if step < 5 else {"a": step, "b": step}, step)
        if step == 3:
            history = histories.state()
    return logger, history


@pytest.mark.parametrize("options", [{"name": "", "version": ""}, {}, {"version": "mine"}], ids=str)
def test_a_csv_file_goes_on_behind_the_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    """The default takes a version of its own at each start; a column came in after the checkpoint."""
    first, history = logged(tmp_path, range(1, 8), **options)
    assert history["CSVLogger-0"]["rows"] == 3, "what was in memory is written"
    first.finalize("failed")
    assert len(rows(first)) == 7
    second = CSVLogger(tmp_path, **options)
    again = LoggerHistories([second])
    again.resume(history, 3)
    for step in range(4, 8):
        second.log_metrics({"a": step}, step)
    assert again.state() == {"CSVLogger-0": {"version": first.version, "rows": 7}}
    assert [(row["a"], row["step"]) for row in rows(second)] == [(str(i), str(i)) for i in range(1, 8)]
    assert second.log_dir == first.log_dir
    assert not list(Path(second.log_dir).glob(".*")), "nothing beside it"


def test_rows_are_counted_again_when_columns_came_in(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    histories = LoggerHistories([logger])
    for step in range(6):
        logger.log_metrics({"a": 0, f"a{step // 2}": 0}, step)
        assert histories.state()["CSVLogger-0"]["rows"] == step + 1


def test_a_checkpoint_that_knows_no_rows_keeps_those_up_to_its_turn(tmp_path: Path) -> None:
    first, _ = logged(tmp_path, range(1, 8), name="", version="")
    first.finalize("failed")
    file = tmp_path / "metrics.csv"
    file.write_text(file.read_text() + "8,")  # half written when it was killed
    second = CSVLogger(tmp_path, "", "")
    LoggerHistories([second]).resume({}, 3)
    assert [row["step"] for row in rows(second)] == ["1", "2", "3"]


def test_a_kill_while_the_file_is_exchanged_loses_nothing(tmp_path: Path) -> None:
    first, history = logged(tmp_path, range(1, 8), name="", version="")
    first.finalize("failed")
    (tmp_path / "metrics.csv").rename(tmp_path / ".metrics.csv.kept")
    second = CSVLogger(tmp_path, "", "")
    LoggerHistories([second]).resume(history, 3)
    assert len(rows(second)) == 3


def test_a_logger_that_begins_too_early_loses_nothing(tmp_path: Path) -> None:
    """Lightning's enable_autolog_hparams makes it, before the run does."""
    first, history = logged(tmp_path, range(1, 8), name="", version="")
    first.finalize("failed")
    second = CSVLogger(tmp_path, "", "")
    histories = LoggerHistories([second])
    histories.protect()
    second.log_hyperparams({"a": 1})
    histories.resume(history, 3)
    assert len(rows(second)) == 3
    histories.protect()
    histories.forget()
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "hparams.yaml"}


def test_a_refused_start_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    first, _ = logged(tmp_path, range(1, 8), name="", version="")
    first.finalize("failed")
    histories = LoggerHistories([CSVLogger(tmp_path, "", "")])
    histories.protect()
    histories.forget()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"] and len(rows(first)) == 7


def test_the_same_logger_may_go_on(tmp_path: Path) -> None:
    """A trainer made anew in Python with the logger that it had."""
    logger, history = logged(tmp_path, range(1, 8))
    LoggerHistories([logger]).resume(history, 3)
    logger.log_metrics({"a": 4}, 4)
    logger.finalize("success")
    assert [row["step"] for row in rows(logger)] == ["1", "2", "3", "4"]


def test_tensorboard_goes_on_in_the_version_it_had(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    first.log_metrics({"a": 1}, 1)
    history = LoggerHistories([first]).state()
    second = TensorBoardLogger(tmp_path)
    LoggerHistories([second]).resume(history, 1)
    assert second.log_dir == first.log_dir


def test_a_file_elsewhere_is_refused_rather_than_lost() -> None:
    with pytest.raises(SettingError, match="memory://logs/lightning_logs/version_0"):
        LoggerHistories([CSVLogger("memory://logs")]).resume({}, 3)


def test_a_server_that_begins_a_new_run_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    history = LoggerHistories([Remote("run-1")]).state()
    with caplog.at_level(logging.WARNING):
        LoggerHistories([Remote("run-1")]).resume(history, 3)
        LoggerHistories([Remote("run-1")]).resume({}, 3)
    assert caplog.text == ""
    LoggerHistories([Remote("run-2")]).resume(history, 3)
    assert "Remote goes on in run-2; what it logged up to turn 3 is in run-1" in caplog.text
