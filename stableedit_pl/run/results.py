"""``results.json``: the final scores, each with how it was measured, and the table of them."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from stableedit_pl.data.stream import EditStream
from stableedit_pl.model.editable_model import EditableModel
from stableedit_pl.model.scoring import KINDS, RULES
from stableedit_pl.run.curves import tensorboard_writers
from stableedit_pl.run.files.directory import RunDirectory, write_atomically
from stableedit_pl.run.files.plain import plain
from stableedit_pl.run.files.results_file import read_results

__all__ = ["edits_per_second", "read_results", "results_table", "scores_table", "write_results"]

_REFERENCES = {
    "base_output": "agreement with the unedited model's own answers to the locality prompts",
    "stated_answer": "agreement with the answers that the data states",
}


def write_results(
    trainer: Trainer,
    editor: EditableModel,
    stream: EditStream,
    results: dict[str, Any],
    measured: Mapping[str, str],
    forked_from: str | None,
) -> None:
    """Write ``results.json`` and show the same in TensorBoard.

    Args:
        trainer: of the finished run.
        editor: whose settings decide the scores.
        stream: what was edited.
        results: counts, scores and seconds.
        measured: score to how it was taken.
        forked_from: run whose weights and statistics this one began with.
    """
    hparams, data = plain(dict(editor.hparams)), plain(dict(stream.hparams))
    results = {
        **results,
        "measured": {
            **measured,
            "rule": f"{editor.scoring}: {RULES[editor.scoring]}",
            "specificity": _REFERENCES[editor.specificity_reference],
            "generalization": "mean over an edit's rephrasings, then over edits that have any",
        },
        "settings": {
            "model": hparams,
            "data": data,
            "forked_from": forked_from,
            "warm_up": None if stream.warm_up is None else {k: getattr(stream.warm_up, k) for k in _WARM_UP},
            "checksums": {f"{name}_sha256": digest for name, digest in stream.checksums().items()},
            "prompt_template": '"<prompt>" and " <target>", tokens joined; special tokens with the prompt only',
            "scoring": editor.scoring,
            "seed": _seed(),
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("stableedit_pl", "torch", "transformers", "lightning")},
            },
        },
    }
    if trainer.is_global_zero:
        text = json.dumps(results, indent=2, default=str) + "\n"
        write_atomically(RunDirectory(trainer.default_root_dir).results, text)
    _show(trainer, results, hparams)


_WARM_UP = ("position", "mode", "turns", "normalization", "own_stream")


def results_table(results: Mapping[str, Any]) -> str:
    """Base, at-edit and retained scores as a small table of text."""
    return scores_table({"base": results["base"], "at-edit": results["at_edit"], "retained": results["retained"]})


def scores_table(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """Scores as a table of text, a row each; a kind that was not measured is a dash."""
    rows: list[tuple[str, ...]] = [("", *KINDS)]
    rows += [(label, *(_cell(given.get(kind)) for kind in KINDS)) for label, given in scores.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def edits_per_second(results: Mapping[str, Any]) -> float:
    """Target edits per second of editing (capture, plan and commit; scores not counted)."""
    seconds = results["seconds"]["edit"]
    return float(results["edits"] / seconds) if seconds else float("nan")


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def _show(trainer: Trainer, results: dict[str, Any], hparams: dict[str, Any]) -> None:
    """The table as text, and the settings as hparams with the final scores as their metrics."""
    # One step past the last turn: a run that is resumed purges what lies there (see RunCurves), so that a final
    # evaluation that is repeated, or overtaken by a longer horizon, leaves one point.
    step = trainer.global_step + 1
    markdown = ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in ("base", "at_edit", "retained"):
        scores = results[name]
        cells = [_cell(scores.get(kind)) for kind in KINDS]
        markdown.append(f"| {name} | " + " | ".join(cells) + " |")
    for writer in tensorboard_writers(trainer):
        writer.add_text("results", "\n".join(markdown), step)
    metrics = {f"final/retained_{kind}": value for kind, value in results["retained"].items() if value is not None}
    flat = {
        name: value if isinstance(value, (int, float, bool, str)) else str(value) for name, value in hparams.items()
    }
    flat |= {"turn_size": results["settings"]["data"].get("turn_size", 0), "edits": results["edits"]}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(flat, {name: torch.tensor(value) for name, value in metrics.items()}, step=step)
