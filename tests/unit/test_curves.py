"""Curves: points at committed turns, and a layout that names the curves that are written."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stableedit_pl import callbacks
from stableedit_pl.run.curves import LAYOUT, log_curves, tensorboard_writers

GROUPS = ["editing", "passes", "stability", "normalization", "cost"]
CHARTS = [
    (page.split(" ", 1)[1], tag) for page, charts in LAYOUT.items() for _, tags in charts.values() for tag in tags
]


class Recorder:
    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.points.append((metrics, step))


def trainer(*loggers: Any, step: int = 7) -> Any:
    return SimpleNamespace(loggers=list(loggers), global_step=step, is_global_zero=True)


def test_points_stand_at_the_committed_turns_of_every_logger() -> None:
    one, other = Recorder(), Recorder()
    log_curves(trainer(one, other, step=12), "cost", {"seconds_plan": 0.5, "edits_per_second": 3})
    expected = [({"cost/seconds_plan": 0.5, "cost/edits_per_second": 3}, 12)]
    assert one.points == other.points == expected


def test_none_is_no_point_and_zero_is_one() -> None:
    logger = Recorder()
    log_curves(trainer(logger), "editing", {"retained_efficacy": 0.0, "retained_generalization": None})
    assert logger.points == [({"editing/retained_efficacy": 0.0}, 7)]


def test_no_loggers_are_no_error() -> None:
    log_curves(trainer(), "editing", {"retained_efficacy": 1.0})
    assert tensorboard_writers(trainer(Recorder())) == []


def test_points_reach_tensorboard_at_their_turn(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="", default_hp_metric=False)
    (writer,) = tensorboard_writers(trainer(CSVLogger(str(tmp_path / "csv")), logger))
    writer.add_custom_scalars(LAYOUT)
    for turn, value in ((3, 0.25), (4, 0.5)):
        log_curves(trainer(logger, step=turn), "editing", {"at_edit_efficacy": value})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("editing/at_edit_efficacy")] == [(3, 0.25), (4, 0.5)]


def test_no_curve_is_called_step() -> None:
    """Lightning renames checkpoints after such a key."""
    assert not any(tag.rsplit("/", 1)[-1] == "step" for _, tag in CHARTS)


@pytest.mark.parametrize(("page", "tag"), CHARTS)
def test_charts_show_curves_of_their_own_group(page: str, tag: str) -> None:
    assert page in GROUPS and tag.split("/")[0] == page and re.compile(tag)


def names_in_callbacks() -> set[str]:
    """Every text constant of the callbacks, formatted pieces as wildcards."""
    found: set[str] = set()
    for file in Path(callbacks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                pieces = [str(p.value) if isinstance(p, ast.Constant) else "*" for p in node.values]
                found.add("".join(pieces))
    return found


@pytest.mark.parametrize(("page", "tag"), CHARTS)
def test_every_chart_has_a_curve_that_is_written(page: str, tag: str) -> None:
    """A renamed curve would leave its chart empty without an error."""
    curve = tag.removeprefix(f"{page}/").removesuffix("/.*").replace(".*", "*")
    stems = {curve, *(f"*{curve[i:]}" for i in range(len(curve)) if curve[i - 1] == "_" or i == 0)}
    stems |= {f"{curve[:i]}*" for i in range(1, len(curve)) if curve[i - 1] == "_"}
    assert stems & names_in_callbacks(), f"nothing in callbacks/ writes {tag}"
