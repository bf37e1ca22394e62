"""Trainer settings that would break an edit stream, refused with what to use instead."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from stableedit_pl.devices.rank_devices import foreign_devices
from stableedit_pl.devices.rank_strategy import WatchedRanks


def check_trainer(trainer: Trainer) -> None:
    """Hold a trainer's settings against what a stream of turns needs.

    Raises:
        MisconfigurationException: one sentence per setting that cannot be used.
    """
    problems = [message for broken, message in _rules(trainer) if broken]
    if problems:
        raise MisconfigurationException("This trainer cannot run an edit stream:\n  - " + "\n  - ".join(problems))


def _rules(trainer: Any) -> list[tuple[bool, str]]:
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    averaging = _named(trainer, WeightAveraging, StochasticWeightAveraging)
    weights = _named(trainer, ModelPruning, BaseFinetuning)
    turns = _named(trainer, GradientAccumulationScheduler, LearningRateFinder, BatchSizeFinder)
    return [
        (
            bool(averaging),
            f"{averaging} puts averaged weights in place of the edited ones behind the optimizer's back, and the edits "
            "would be lost; leave it out. model.ridge and the step size keep updates small, StabilityMonitor watches "
            "them.",
        ),
        (
            bool(weights),
            f"{weights} changes weights, or which of them train, behind the optimizer's back; leave it out, "
            "model.sites says what is edited.",
        ),
        (
            bool(turns),
            f"{turns} would skip, repeat or join turns, and every edit is applied once; leave it out. data.turn_size "
            "has the edits of a turn, data.micro_batch_tokens the memory.",
        ),
        (
            trainer.accumulate_grad_batches != 1,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would delay turns; "
            "use data.turn_size for the edits of a turn and data.micro_batch_tokens for memory.",
        ),
        (
            trainer.gradient_clip_val is not None,
            "gradient_clip_val has nothing to clip, an update is solved, not stepped; use model.ridge or "
            "model.step_size to keep it small.",
        ),
        (
            bool(trainer.overfit_batches),
            "overfit_batches repeats turns, and every edit is applied once; use data.max_edits for a short stream.",
        ),
        (
            bool(trainer.fast_dev_run),
            "fast_dev_run would drop turns; use trainer.max_steps=1 in a run_dir of its own.",
        ),
        (
            not (trainer.fast_dev_run or _all_batches(trainer.limit_train_batches)),
            f"limit_train_batches={trainer.limit_train_batches} would drop turns; use trainer.max_steps as the "
            "horizon in turns, or data.max_edits.",
        ),
        (
            trainer.max_epochs != 1,
            f"max_epochs={trainer.max_epochs}: a stream has no epochs; use max_epochs=1, with max_steps for a horizon.",
        ),
        (
            trainer.max_steps == 0,
            "max_steps=0 leaves no turn; it is the horizon in turns, -1 for the whole stream.",
        ),
        (
            trainer.min_epochs not in (None, 0, 1) or trainer.min_steps is not None,
            "min_epochs and min_steps have no meaning for a stream; leave them out.",
        ),
        (
            trainer.precision == "16-mixed",
            "precision=16-mixed scales the loss, and with it the value gradients; use bf16-mixed or 16-true.",
        ),
        (
            trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler,
            "use_distributed_sampler would shuffle and split the stream; set it to false.",
        ),
        (
            trainer.world_size > 1 and not isinstance(trainer.strategy, WatchedRanks),
            f"{trainer.world_size} processes under {type(trainer.strategy).__name__}, which splits or wraps the model; "
            "use EditTrainer with strategy=ddp, where each process holds the whole model, or strategy=sharded, where "
            "they divide its weights (or one process, with DevicePlacement to spread a model over several devices).",
        ),
        (
            bool(shared := _shared_devices(trainer)),
            f"the device map puts parts of the model on {', '.join(shared)}, which other processes use as well; use "
            "DevicePlacement.device_map auto, balanced or sequential, with trainer.devices naming the first device of "
            "each process ([0, 4]: four each), or set trainer.devices to 1.",
        ),
        (
            any(callback.save_on_exception for callback in checkpoints)
            or any(isinstance(callback, OnExceptionCheckpoint) for callback in trainer.callbacks),
            "ModelCheckpoint(save_on_exception=True) and OnExceptionCheckpoint could save a turn without its ledger "
            "lines; leave them out, TurnCheckpoint saves completed turns.",
        ),
    ]


def _named(trainer: Any, *kinds: type) -> str:
    """The trainer's callbacks of these classes by name; empty if it has none."""
    return ", ".join(dict.fromkeys(type(c).__name__ for c in trainer.callbacks if isinstance(c, kinds)))


def _shared_devices(trainer: Any) -> list[str]:
    """Devices in the model's map that are not this process's own; an automatic map takes them all."""
    device_map = getattr(trainer.lightning_module, "device_map", None)
    if device_map is None or trainer.world_size == 1:
        return []
    if isinstance(device_map, str) and not device_map.startswith(("cpu", "cuda", "mps")):
        return [f"every device ({device_map})"]
    return foreign_devices(trainer, device_map.values() if isinstance(device_map, dict) else [device_map])


def _all_batches(limit: int | float | None) -> bool:
    """Whether a limit is none: 1.0 is all batches, but 1 is one batch."""
    return limit is None or (isinstance(limit, float) and limit == 1.0)
