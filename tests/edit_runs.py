"""Edit runs for tests: one call from settings to a finished run."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import LLAMA_SITE
from torch import Tensor

from stableedit_pl.callbacks import EditEvaluation
from stableedit_pl.data.stream import EditStream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.trainer import EditTrainer

PASSES = 4
"""Of a turn, unless a test says otherwise: promises hold for several as for one, whose numbers the reference has."""


def fit(
    run_dir: Path,
    base_model: str,
    stream: dict[str, Any],
    model: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    trainer: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
) -> LifelongEditor:
    """Run a stream; quiet, on the CPU, scored only at the end unless callbacks say otherwise; several passes a turn."""
    settings = {"step_size": 1e-3, "ridge": 1.0, "passes": PASSES, "sites": [LLAMA_SITE], **(model or {})}
    editor = LifelongEditor(base_model=base_model, **settings)
    data = EditStream(**{"turn_size": 8, "micro_batch_size": 3, **stream})
    given = list(callbacks or [])
    if not any(isinstance(callback, EditEvaluation) for callback in given):
        given.append(EditEvaluation(every_n_turns=None))
    run = EditTrainer(
        run_dir=str(run_dir), accelerator="cpu", enable_progress_bar=False, callbacks=given, **(trainer or {})
    )
    run.fit(editor, datamodule=data, ckpt_path=ckpt_path)
    return editor


def updates(editor: LifelongEditor) -> dict[str, Tensor]:
    """Accumulated update of each site in float64, the weight's layout."""
    return {site.name: site.state.double().cpu() - site.original.double() for site in editor.sites}


def saved_state(run_dir: Path) -> dict[str, Tensor]:
    """Weights and moments in the newest checkpoint."""
    checkpoint = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the ledger."""
    return [json.loads(line) for line in (run_dir / "edits.jsonl").read_text().splitlines()]


def results(run_dir: Path) -> dict[str, Any]:
    """``results.json``."""
    return json.loads((run_dir / "results.json").read_text())


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All TensorBoard scalars but the cost, which is wall-clock time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("cost/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
