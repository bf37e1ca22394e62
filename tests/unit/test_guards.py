"""Trainer settings that would break a stream are refused, each with what to use instead."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import StrategyRegistry

from stableedit_pl.devices.rank_strategy import RankStrategy
from stableedit_pl.run.guards import check_trainer
from stableedit_pl.trainer import EditTrainer


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer(**changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": "callbacks" in changes,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return Trainer(**(options | changes))


def refusals(made: Trainer) -> list[str]:
    with pytest.raises(MisconfigurationException) as raised:
        check_trainer(made)
    head, *lines = str(raised.value).splitlines()
    assert head == "This trainer cannot run an edit stream:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 200},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "16-true"},
        {"min_epochs": 1},
        {"limit_val_batches": 3},
        {"callbacks": [ModelCheckpoint(every_n_train_steps=5)]},
        {"use_distributed_sampler": True},
    ],
    ids=lambda changes: ", ".join(changes) or "defaults",  # alike in every process that collects tests
)
def test_what_a_stream_can_use_passes(changes: dict[str, Any], tmp_path: Path) -> None:
    check_trainer(trainer(default_root_dir=str(tmp_path), **changes))


@pytest.mark.parametrize(
    ("changes", "names", "instead"),
    [
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches=4", "data.micro_batch_tokens"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val", "model.ridge or model.step_size"),
        ({"gradient_clip_val": 0}, "gradient_clip_val", "model.ridge"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5 would drop turns", "trainer.max_steps"),
        ({"limit_train_batches": 3}, "limit_train_batches=3", "data.max_edits"),
        ({"limit_train_batches": 0}, "limit_train_batches=0", "data.max_edits"),
        ({"max_epochs": 2}, "max_epochs=2: a stream has no epochs", "max_epochs=1"),
        ({"max_epochs": -1}, "max_epochs=-1", "max_steps for a horizon"),
        ({"max_epochs": None, "max_steps": 5}, "max_epochs=None", "max_epochs=1"),
        ({"max_epochs": None}, "max_epochs=None", "max_epochs=1"),
        ({"max_steps": 0}, "max_steps=0 leaves no turn", "-1 for the whole stream"),
        ({"min_steps": 5}, "min_epochs and min_steps have no meaning", "leave them out"),
        ({"min_epochs": 2, "max_epochs": 2}, "min_epochs and min_steps", "leave them out"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_breaks_the_stream_is_refused(changes: dict[str, Any], names: str, instead: str) -> None:
    found = [line for line in refusals(trainer(**changes)) if names in line]
    assert len(found) == 1 and instead in found[0]


def test_a_limit_of_one_batch_is_refused() -> None:
    """All turns but the first would be dropped, silently."""
    assert any("limit_train_batches=1" in line for line in refusals(trainer(limit_train_batches=1)))


@pytest.mark.parametrize("value", [1, 3, 0.5])
def test_overfit_batches_is_refused(value: float) -> None:
    assert any("overfit_batches repeats turns" in line for line in refusals(trainer(overfit_batches=value)))


def test_loss_scaling_is_refused(monkeypatch: Any) -> None:
    made = trainer()
    monkeypatch.setattr(Trainer, "precision", property(lambda _self: "16-mixed"))
    (line,) = refusals(made)
    assert "precision=16-mixed scales the loss" in line and "bf16-mixed or 16-true" in line


def test_several_processes_need_our_strategy() -> None:
    (line,) = refusals(trainer(devices=2, strategy="ddp"))
    assert "2 processes under DDPStrategy" in line and "strategy=ddp" in line and "DevicePlacement" in line
    both = refusals(trainer(devices=2, strategy="ddp", use_distributed_sampler=True))
    assert len(both) == 2 and any("shuffle and split the stream" in line for line in both)


def test_ranks_may_share_a_stream_but_not_split_it() -> None:
    check_trainer(trainer(devices=2, strategy=RankStrategy()))
    (line,) = refusals(trainer(devices=2, strategy=RankStrategy(), use_distributed_sampler=True))
    assert "shuffle and split the stream" in line


@pytest.mark.parametrize(
    ("device_map", "shared"),
    [("auto", "every device (auto)"), ({"": "cpu", "lm_head": 1}, "cuda:1"), ("cuda:3", "cuda:3"), ("cpu", None)],
)
def test_ranks_spread_their_models_over_their_own_devices_only(device_map: Any, shared: str | None) -> None:
    made = trainer(devices=2, strategy=RankStrategy())
    made.strategy._lightning_module = SimpleNamespace(device_map=device_map)
    if shared is None:
        check_trainer(made)
        return
    (line,) = refusals(made)
    assert f"parts of the model on {shared}, which other processes use as well" in line
    assert "DevicePlacement.device_map" in line and "trainer.devices to 1" in line
    alone = trainer()
    alone.strategy._lightning_module = SimpleNamespace(device_map=device_map)
    check_trainer(alone)


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_the_edit_trainer_means_ranks_by_ddp_and_leaves_lightning_alone(tmp_path: Path, strategy: str) -> None:
    before = dict(StrategyRegistry["ddp"])
    made = EditTrainer(run_dir=str(tmp_path), accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert type(made.strategy) is RankStrategy
    check_trainer(made)
    assert StrategyRegistry["ddp"] == before
    assert not isinstance(trainer(devices=2, strategy="ddp").strategy, RankStrategy)


def test_saving_on_an_exception_is_refused(tmp_path: Path) -> None:
    made = trainer(callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)], default_root_dir=str(tmp_path))
    (line,) = refusals(made)
    assert "save_on_exception=True" in line and "TurnCheckpoint" in line


def test_the_callback_that_saves_on_an_exception_is_refused(tmp_path: Path) -> None:
    made = trainer(callbacks=[OnExceptionCheckpoint(tmp_path)], default_root_dir=str(tmp_path))
    assert any("exception" in line.lower() for line in refusals(made))


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (EMAWeightAveraging(), "EMAWeightAveraging puts averaged weights in place of the edited ones"),
        (WeightAveraging(), "WeightAveraging puts averaged weights"),
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging puts averaged weights"),
        (ModelPruning("l1_unstructured"), "ModelPruning changes weights"),
        (BackboneFinetuning(), "BackboneFinetuning changes weights, or which of them train"),
        (GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler would skip, repeat or join turns"),
        (LearningRateFinder(), "LearningRateFinder would skip, repeat or join turns"),
        (BatchSizeFinder(), "BatchSizeFinder would skip, repeat or join turns"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_callbacks_that_change_weights_or_turns_are_refused(callback: Any, why: str, tmp_path: Path) -> None:
    found = [line for line in refusals(trainer(callbacks=[callback], default_root_dir=str(tmp_path))) if why in line]
    assert len(found) == 1 and "leave it out" in found[0]


def test_callbacks_that_only_look_pass(tmp_path: Path) -> None:
    check_trainer(trainer(callbacks=[LearningRateMonitor(), Timer()], logger=True, default_root_dir=str(tmp_path)))


def test_the_edit_trainer_refuses_before_anything_is_loaded_or_made(tmp_path: Path) -> None:
    """WeightAveraging copies the model in its own setup."""
    made = EditTrainer(run_dir=str(tmp_path / "run"), accelerator="cpu", callbacks=[EMAWeightAveraging()])
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging"):
        made.fit(None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_all_problems_come_in_one_message() -> None:
    lines = refusals(trainer(accumulate_grad_batches=2, gradient_clip_val=1.0, max_epochs=3, limit_train_batches=2))
    assert len(lines) == 4
