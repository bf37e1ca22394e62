"""Curves: TensorBoard scalars on an axis of committed turns, and how they are laid out.

``LightningModule.log`` counts batches, repeats stale values and shifts by one after some resumes; every curve
here is written through :func:`log_curves` instead.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1 editing": {
        "Retained: does the model still know its edits, and everything else?": [
            "Multiline",
            ["editing/retained_efficacy", "editing/retained_generalization", "editing/retained_specificity"],
        ],
        "At edit: does an edit work right after its turn?": ["Multiline", ["editing/at_edit_efficacy"]],
        "Loss of a turn's edits, before and after": ["Multiline", ["editing/loss_before", "editing/loss_after"]],
    },
    "2 passes": {
        "Loss of a turn's edits as each of its passes found it": ["Multiline", ["passes/loss_.*"]],
        "Their token match as each pass found it": ["Multiline", ["passes/token_match_.*"]],
        "Passes of a turn": ["Multiline", ["passes/used"]],
    },
    "3 stability": {
        "Size of each update": ["Multiline", ["stability/update_norm/.*"]],
        "Growth of the edited weights, |W| / |W_0|": ["Multiline", ["stability/weight_norm_ratio/.*"]],
        "Cosine of an update to the one before, and to the sum of all": [
            "Multiline",
            ["stability/cosine_to_previous/.*", "stability/cosine_to_sum/.*"],
        ],
        "Fraction of the update that the weight's dtype kept": ["Multiline", ["stability/survived/.*"]],
    },
    "4 normalization": {
        "Rows in the moments": ["Multiline", ["normalization/rows/.*"]],
        "Condition number of the value gradients' covariance": ["Multiline", ["normalization/condition_number/.*"]],
        "Its extreme eigenvalues": [
            "Multiline",
            ["normalization/largest_eigenvalue/.*", "normalization/smallest_eigenvalue/.*"],
        ],
    },
    "5 cost": {
        "Seconds per turn": ["Multiline", ["cost/seconds_[a-o].*", "cost/seconds_plan", "cost/seconds_score"]],
        "Seconds per pass": ["Multiline", ["cost/seconds_pass_.*"]],
        "Edits per second": ["Multiline", ["cost/edits_per_second"]],
    },
}
"""TensorBoard's custom layout: the story a newcomer should see first."""


def log_curves(trainer: Trainer, group: str, values: Mapping[str, float | None]) -> None:
    """Write points at the number of committed turns.

    Args:
        trainer: whose loggers receive them.
        group: ``editing``, ``passes``, ``stability``, ``normalization`` or ``cost``.
        values: curve to value; None is no point.
    """
    points = {f"{group}/{name}": value for name, value in values.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(points, step=trainer.global_step)


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """The ``SummaryWriter`` of each TensorBoard logger; rank 0 alone has any."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
