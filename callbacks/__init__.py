"""Callbacks of an edit run; imported as ``stableedit_pl.callbacks``."""

from stableedit_pl.callbacks.device_placement import DevicePlacement
from stableedit_pl.callbacks.edit_evaluation import EditEvaluation
from stableedit_pl.callbacks.edit_ledger import EditLedger
from stableedit_pl.callbacks.rank_agreement import RankAgreement
from stableedit_pl.callbacks.run_advice import RunAdvice
from stableedit_pl.callbacks.run_curves import RunCurves
from stableedit_pl.callbacks.stability_monitor import StabilityMonitor
from stableedit_pl.callbacks.statistics_checkpoint import StatisticsCheckpoint
from stableedit_pl.callbacks.turn_checkpoint import TurnCheckpoint
from stableedit_pl.callbacks.turn_progress import TurnProgress
from stableedit_pl.callbacks.warm_up import WarmUp

__all__ = [
    "DevicePlacement",
    "EditEvaluation",
    "EditLedger",
    "RankAgreement",
    "RunAdvice",
    "RunCurves",
    "StabilityMonitor",
    "StatisticsCheckpoint",
    "TurnCheckpoint",
    "TurnProgress",
    "WarmUp",
]
