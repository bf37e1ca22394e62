"""``stableedit verify``: is what a run directory holds whole, and does it belong together?"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stableedit_pl.model.files.base_files import folder_at_hand, resolve_base_model
from stableedit_pl.model.files.weights_digest import weights_digest
from stableedit_pl.run.files.checkpoint_file import CheckpointError, read_checkpoint
from stableedit_pl.run.files.directory import RunDirectory, RunDirectoryError
from stableedit_pl.run.files.integrity import damage
from stableedit_pl.run.files.ledger import LedgerError, Position, read_ledger
from stableedit_pl.run.files.results_file import read_results


@dataclass
class Verdict:
    """What was looked at.

    Attributes:
        passed: a sentence per check that held.
        problems: a sentence per check that did not.
    """

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self, holds: bool, good: str, bad: str) -> bool:
        """Note a check."""
        (self.passed if holds else self.problems).append(good if holds else bad)
        return holds

    def text(self) -> str:
        """The checks as lines, problems last."""
        lines = [f"ok       {sentence}" for sentence in self.passed]
        return "\n".join(lines + [f"PROBLEM  {sentence}" for sentence in self.problems])


@dataclass
class _Ledger:
    """What a walk along the ledger found."""

    lines: int = 0
    edits: int = 0
    at_edit_sum: float = 0.0
    last_turn: int = -1
    position_hash: str = ""


def verify_run(run: str) -> Verdict:
    """Check a run directory: ledger, checkpoints, statistics file and results, each whole and all of one run.

    Args:
        run: run directory.

    Returns:
        The verdict; it has problems when something is wrong.

    Raises:
        RunDirectoryError: if there is no run.
    """
    directory = RunDirectory(run)
    if not directory.holds_run():
        raise RunDirectoryError(f"--run {run}: there is no run")
    verdict = Verdict()
    checkpoint = _newest(directory, verdict)
    if checkpoint is None:
        return verdict
    position = _position(checkpoint, "edits")
    ledger = _ledger(directory.ledger, position, checkpoint["stableedit"]["committed_turns"], verdict)
    _rejected(directory.rejected, _position(checkpoint, "rejected"), verdict)
    _statistics(directory.statistics, checkpoint, verdict)
    if ledger is not None:
        _results(directory.results, checkpoint, ledger, verdict)
    _base_model(checkpoint, verdict)
    return verdict


def _newest(directory: RunDirectory, verdict: Verdict) -> dict[str, Any] | None:
    files = [file for file in (directory.last_checkpoint, *directory.turn_checkpoints()) if file.is_file()]
    found = {file: damage(file) for file in files}
    files = [file for file in files if file.is_file()]  # a run that goes on meanwhile removes its older ones
    damaged = {file: problem for file in files if (problem := found[file]) is not None}
    for file, problem in damaged.items():
        verdict.problems.append(f"{file.name} is damaged: {problem}; resuming passes it over")
    whole = [file for file in files if file not in damaged]
    if not verdict.check(bool(whole), f"{len(whole)} checkpoint files are whole", "there is no whole checkpoint"):
        return None
    try:
        checkpoint = read_checkpoint(whole[0])
        turns = checkpoint["stableedit"]["committed_turns"]
        finite = all(bool(torch.isfinite(t).all()) for t in checkpoint["state_dict"].values() if t.is_floating_point())
    except (CheckpointError, KeyError) as error:
        verdict.problems.append(f"{whole[0].name} is not a checkpoint of an edit run: {error}")
        return None
    verdict.check(finite, f"{whole[0].name}: turn {turns}, all numbers finite", f"{whole[0].name}: not all finite")
    verdict.check(
        turns == checkpoint["global_step"],
        "its position is the trainer's",
        f"{whole[0].name} has {turns} committed turns, but the trainer's step is {checkpoint['global_step']}",
    )
    return checkpoint


def _position(checkpoint: dict[str, Any], name: str) -> Position:
    state = checkpoint["callbacks"].get("EditLedger", {}).get(name, {})
    return Position(**state)


def _ledger(path: Path, position: Position, turns: int, verdict: Verdict) -> _Ledger | None:
    """Walk along the whole ledger; gather what lies within the checkpoint's position."""
    found, ids, beyond = _Ledger(), Counter[tuple[str, str]](), 0
    ordered = True
    try:
        for entry, reached in read_ledger(path):
            if reached.size > position.size:
                beyond += 1
                continue
            ordered = ordered and entry["turn"] >= found.last_turn
            found.lines, found.last_turn, found.position_hash = reached.lines, entry["turn"], reached.hash
            ids[entry["phase"], entry["id"]] += 1
            if entry["phase"] == "edit":
                found.edits += 1
                found.at_edit_sum += entry["at_edit"] or 0.0
    except (LedgerError, OSError, KeyError) as error:
        verdict.problems.append(f"ledger: {error}")
        return None
    verdict.passed.append(f"edits.jsonl: {found.lines + beyond} lines, the running hash holds")
    verdict.check(
        (found.lines, found.position_hash) == (position.lines, position.hash),
        f"its first {position.lines} lines are those of the checkpoint"
        + (f"; {beyond} more belong to turns that resuming applies again" if beyond else ""),
        f"the checkpoint knows {position.lines} lines, but edits.jsonl has {found.lines} up to there or others",
    )
    twice = [f"{phase} {name}" for (phase, name), count in ids.items() if count > 1]
    verdict.check(not twice, "no edit stands there twice", f"applied more than once: {', '.join(twice[:5])}")
    verdict.check(
        ordered and found.last_turn < turns,
        "its turns are in order",
        f"its turns are out of order, or beyond the checkpoint's {turns}",
    )
    return found


def _rejected(path: Path, position: Position, verdict: Verdict) -> None:
    if not position.lines:
        return
    try:
        lines = sum(reached.size <= position.size for _, reached in read_ledger(path))
    except (LedgerError, OSError) as error:
        verdict.problems.append(f"rejected edits: {error}")
        return
    verdict.check(
        lines == position.lines,
        f"rejected.jsonl: {lines} lines, the running hash holds",
        f"the checkpoint knows {position.lines} rejected edits, rejected.jsonl has {lines}",
    )


def _statistics(path: Path, checkpoint: dict[str, Any], verdict: Verdict) -> None:
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            turns = int(file.metadata()["turns"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        verdict.problems.append(f"statistics.safetensors cannot be read: {error}")
        return
    finite = all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    verdict.check(finite, f"statistics.safetensors: turn {turns}", "statistics.safetensors: not all numbers are finite")
    if turns == checkpoint["stableedit"]["committed_turns"]:
        stored = {n.removeprefix("statistics/"): t for n, t in checkpoint["state_dict"].items()}
        same: Callable[[str], bool] = lambda name: name in stored and torch.equal(tensors[name], stored[name])  # noqa: E731
        verdict.check(
            all(same(name) for name in tensors),
            "it equals the checkpoint's moments",
            "statistics.safetensors differs from the moments in the checkpoint of the same turn",
        )


def _results(path: Path, checkpoint: dict[str, Any], ledger: _Ledger, verdict: Verdict) -> None:
    if not path.is_file():
        return
    try:
        results = read_results(path)
        turns, edits, at_edit = results["turns"], results["edits"], results["at_edit"]["efficacy"]
    except (ValueError, KeyError) as error:
        verdict.problems.append(f"results.json cannot be read: {error}")
        return
    committed = checkpoint["stableedit"]["committed_turns"]
    if turns != committed:
        verdict.passed.append(f"results.json is of turn {turns}; the run has gone on since")
        return
    verdict.check(
        edits == ledger.edits,
        f"results.json: {edits} edits, as many as the ledger",
        f"results.json says {edits} edits, the ledger has {ledger.edits}",
    )
    mean = ledger.at_edit_sum / ledger.edits if ledger.edits else None
    same = mean == at_edit if mean is None or at_edit is None else abs(mean - at_edit) < 1e-9
    verdict.check(
        same,
        "its at-edit efficacy is the ledger's mean",
        f"results.json says at-edit efficacy {at_edit}, the ledger's mean is {mean}",
    )


def _base_model(checkpoint: dict[str, Any], verdict: Verdict) -> None:
    """Whether the base model is still the one that the run edits, where its files are at hand."""
    identity = checkpoint["stableedit"]
    wanted = identity["fingerprint"].get("base_weights")
    if wanted is None:  # a checkpoint of before
        return
    base_model = checkpoint["hyper_parameters"]["base_model"]
    folder = folder_at_hand(resolve_base_model(base_model), identity.get("base_commit"))
    if folder is None:
        return
    try:
        same = weights_digest(folder) == wanted
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        verdict.problems.append(f"base model {base_model}: its weights in {folder} cannot be read: {error}")
        return
    verdict.check(
        same,
        f"base model {base_model}: its weights are those that the run began with",
        f"base model {base_model}: its weights in {folder} are not those that the run began with, so that it neither "
        "resumes nor can be exported",
    )
