"""Turns whose numbers are bad: stopped before the commit, or skipped and written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import assert_same_state, curves, fit, ledger, results, saved_state
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl import editor as editor_module
from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor, TurnCheckpoint
from stableedit_pl.cli.verify import verify_run
from stableedit_pl.method.planning import BadTurn

BAD_TURN = 2


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the rows or losses of turn 2 bad, by the turn's first edit, in every process and resume alike."""

    def arm(kind: str) -> None:
        real = editor_module.LifelongEditor.training_step

        def training_step(self: Any, turn: Any, batch_idx: int) -> Any:
            loss = real(self, turn, batch_idx)
            if turn.index == BAD_TURN:
                rows = self._captured.rows[LLAMA_SITE]
                if kind == "gradient":
                    rows.gradients[0, 0] = float("nan")
                elif kind == "key":
                    rows.keys[0, 0] = float("inf")
                elif kind == "moment":
                    rows.gradients[0, 0] = 3e38
                    rows.gradients[1, 0] = -3e38
                elif kind == "loss":
                    self._captured.measured[0, 0] = float("nan")
                elif kind == "zero":
                    rows.keys.zero_()
            return loss

        monkeypatch.setattr(editor_module.LifelongEditor, "training_step", training_step)

    return arm


SAID = {
    "gradient": "not finite",
    "key": "not finite",
    "moment": "statistics would not be finite",
    "loss": "loss of the turn's edits is not finite",
    "zero": "exactly zero",
}

MODELS = {"zero": {"passes": 1}}
"""A further pass has keys of its own."""


@pytest.mark.parametrize("kind", SAID)
def test_a_bad_turn_stops_the_run_before_the_commit(
    tmp_path: Path, llama_folder: str, stream_file: str, poison: Any, kind: str
) -> None:
    model = MODELS.get(kind)
    clean = fit(tmp_path / "clean", llama_folder, {"path": stream_file}, model, trainer={"max_steps": BAD_TURN})
    poison(kind)
    callbacks = [TurnCheckpoint(every_n_turns=1)]
    with pytest.raises(BadTurn, match=SAID[kind]):
        fit(tmp_path / "bad", llama_folder, {"path": stream_file}, model, callbacks=callbacks)
    assert_same_state(saved_state(tmp_path / "bad"), clean.state_dict())
    assert ledger(tmp_path / "bad") == ledger(tmp_path / "clean")
    assert not (tmp_path / "bad/rejected.jsonl").exists()


@pytest.mark.parametrize("kind", SAID)
def test_a_bad_turn_is_skipped_when_told_to(
    tmp_path: Path, llama_folder: str, stream_file: str, poison: Any, kind: str
) -> None:
    """Nothing of turn 2 is applied: the rest is the run on a stream without its edits."""
    rows = edit_rows(33)
    without = write_stream(tmp_path / "without.jsonl", rows[:16] + rows[24:])
    model = MODELS.get(kind, {})
    expected = fit(tmp_path / "without", llama_folder, {"path": without}, model)
    poison(kind)
    run = tmp_path / "run"
    editor = fit(
        run, llama_folder, {"path": stream_file}, {"bad_turns": "skip", **model}, callbacks=[StabilityMonitor()]
    )
    assert_same_state(editor.state_dict(), expected.state_dict())
    assert [line["id"] for line in ledger(run)] == [f"e0-{i}" for i in [*range(16), *range(24, 33)]]
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [line["id"] for line in rejected] == [f"e0-{i}" for i in range(16, 24)]
    assert all(SAID[kind] in line["reason"] and line["turn"] == BAD_TURN for line in rejected)
    found = results(run)
    assert (found["edits"], found["turns"], found["rejected"]) == (25, 5, {"turns": 1, "edits": 8})
    assert found["retained"] == results(tmp_path / "without")["retained"]
    assert [value for _, value in curves(run)["editing/rejected_turns"]] == [0, 0, 1, 1, 1]
    assert verify_run(str(run)).problems == []


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_with_a_skipped_turn_resumes_exactly(
    tmp_path: Path, llama_folder: str, stream_file: str, poison: Any, stop: int
) -> None:
    poison("gradient")
    model, data = {"bad_turns": "skip", "max_update_norm": 50.0}, {"path": stream_file}
    callbacks = lambda: [StabilityMonitor(), EditEvaluation(1, 40)]  # noqa: E731
    fit(tmp_path / "whole", llama_folder, data, model, callbacks=callbacks())
    fit(tmp_path / "run", llama_folder, data, model, callbacks=callbacks(), trainer={"max_steps": stop})
    fit(tmp_path / "run", llama_folder, data, model, callbacks=callbacks(), ckpt_path="last")
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))
    for file in ("edits.jsonl", "rejected.jsonl"):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")


def test_an_update_far_above_the_running_median_is_bad(tmp_path: Path, llama_folder: str) -> None:
    """From the sixth turn on, an update is held against the median of those before."""
    stream = write_stream(tmp_path / "edits.jsonl", edit_rows(48))
    editor = fit(tmp_path / "plain", llama_folder, {"path": stream, "turn_size": 4})
    norms = editor.state.update_norms
    assert len(norms) == 12 and all(norm > 0 for norm in norms)
    medians = [sorted(norms[:i])[i // 2] if i % 2 else sum(sorted(norms[:i])[i // 2 - 1 : i // 2 + 1]) / 2 for i in range(1, 12)]  # fmt: skip  # noqa: E501
    ratios = [norm / median for norm, median in zip(norms[1:], medians, strict=True)]
    first = next(i + 1 for i in range(4, 11) if ratios[i] >= max(ratios[4 : i + 1]) and ratios[i] > ratios[4] - 1e-9)
    limit = ratios[first - 1] * 0.999
    assert all(ratio < limit for ratio in ratios[4 : first - 1])
    with pytest.raises(BadTurn, match=r"more than max_update_norm=.* times the running median .* of \d+ turns"):
        fit(tmp_path / "bad", llama_folder, {"path": stream, "turn_size": 4}, {"max_update_norm": limit})
    assert ledger(tmp_path / "bad")[-1]["turn"] == first - 1
    loose = fit(tmp_path / "loose", llama_folder, {"path": stream, "turn_size": 4}, {"max_update_norm": 1e6})
    assert torch.equal(loose.sites[0].weight, editor.sites[0].weight)
