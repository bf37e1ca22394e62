"""Tuning: what is tried, that the model is as before, that the best is found, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import LLAMA_SITE, edit_rows, tiny_llama, write_stream

from stableedit_pl.callbacks import ProtectedDirections
from stableedit_pl.data.stream import EditStream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.trainer import EditTrainer
from stableedit_pl.tune import halving
from stableedit_pl.tune.bench import Bench, Stream
from stableedit_pl.tune.candidates import Candidate, candidates, site_windows
from stableedit_pl.tune.outcome import Goal, TuneResult


@pytest.fixture
def parts(tmp_path: Path, llama_folder: str) -> tuple[LifelongEditor, EditStream, EditTrainer]:
    rows = edit_rows(60)
    stream = EditStream(
        path=write_stream(tmp_path / "edits.jsonl", rows[:20]),
        warmup_path=write_stream(tmp_path / "warmup.jsonl", rows[20:52]),
        turn_size=8,
    )
    editor = LifelongEditor(llama_folder, [LLAMA_SITE])
    trainer = EditTrainer(run_dir=str(tmp_path / "run"), accelerator="cpu", enable_progress_bar=False, logger=False)
    return editor, stream, trainer


def test_it_finds_better_settings_than_bad_ones_and_leaves_the_model_as_it_was(
    tmp_path: Path, llama_folder: str, parts: Any, capsys: Any
) -> None:
    _, stream, trainer = parts
    editor = LifelongEditor(llama_folder, [LLAMA_SITE], relative_step=1e-5, relative_ridge=10.0, passes=1)
    editor.configure_model()
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    found = trainer.tune(editor, stream, out=str(tmp_path / "out/tuned.yaml"), trials=7, seed=3)
    for name, tensor in editor.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert found.streams[0].candidate == Candidate((LLAMA_SITE,), 1e-5, 10.0, 1), "the configured ones come first"
    assert found.best is not found.streams[0]
    assert found.goal.value(found.best) > found.goal.value(found.streams[0])
    assert found.best.turns == 4 and len(found.streams) == 7
    assert found.streams[0].turns == 2, "only the best third goes on"
    suggestion = found.suggestion()
    assert suggestion["step_size"] is None and suggestion["ridge"] is None
    overlay = yaml.safe_load((tmp_path / "out/tuned.yaml").read_text())
    assert overlay == {"model": suggestion}
    LifelongEditor(llama_folder, **suggestion)
    figures = json.loads((tmp_path / "out/tune.json").read_text())
    assert figures["suggestion"] == suggestion and len(figures["tried"]) == 7
    assert figures["tried"][0]["relative_step"] == 1e-5
    assert (tmp_path / "out/tune.png").stat().st_size > 1000
    assert found.best in found.front()
    assert not (tmp_path / "run").exists(), "nothing is written to run_dir"


def test_the_same_seed_finds_the_same_with_a_runs_scores(tmp_path: Path, llama_folder: str, parts: Any) -> None:
    editor, stream, trainer = parts
    one = trainer.tune(editor, stream, out=str(tmp_path / "one.yaml"), trials=4, seed=1)
    other = trainer.tune(
        LifelongEditor(llama_folder, [LLAMA_SITE]), stream, out=str(tmp_path / "other.yaml"), trials=4, seed=1
    )
    tried = [[(s.candidate, s.turns, s.scores) for s in found.streams] for found in (one, other)]
    assert tried[0] == tried[1]
    different = trainer.tune(editor, stream, out=str(tmp_path / "different.yaml"), trials=4, seed=2)
    assert [s.candidate for s in different.streams] != [s.candidate for s in one.streams]
    # The best settings, as a run on the same rows whose statistics know them: the same scores.
    from edit_runs import fit, results

    from stableedit_pl.callbacks import WarmUp

    best = one.best
    model = {**one.suggestion(), "sites": list(best.candidate.sites)}
    data = {"path": stream.warmup_path, "turn_size": 8, "micro_batch_size": None, "max_edits": 8 * best.turns}
    fit(tmp_path / "check", llama_folder, data, model, callbacks=[WarmUp(mode="statistics_only")])
    retained = results(tmp_path / "check")["retained"]
    assert best.scores == pytest.approx({kind: retained[kind] for kind in best.scores}, abs=1e-6)


def test_protected_directions_of_the_run_are_tuned_with(tmp_path: Path, llama_folder: str, parts: Any) -> None:
    editor, stream, trainer = parts
    plain = trainer.tune(editor, stream, out=str(tmp_path / "plain.yaml"), trials=1)
    guarded = EditTrainer(run_dir=str(tmp_path / "run"), accelerator="cpu", enable_progress_bar=False, logger=False,
                          callbacks=[ProtectedDirections(weight=3.0)])  # fmt: skip
    found = guarded.tune(editor, stream, out=str(tmp_path / "guarded.yaml"), trials=1)
    assert found.streams[0].state.guards[LLAMA_SITE].weight == 3.0
    assert found.streams[0].scores["specificity"] > plain.streams[0].scores["specificity"]


def test_rows_that_the_stream_edits_are_refused(tmp_path: Path, parts: Any) -> None:
    editor, stream, trainer = parts
    overlapping = write_stream(tmp_path / "both.jsonl", [*edit_rows(60)[52:], edit_rows(60)[3]])
    with pytest.raises(SettingError, match=r"1 rows of .*both.jsonl have prompts that .*edits.jsonl edits.*row 9"):
        trainer.tune(editor, stream, rows=overlapping)
    stream.warmup_path = None
    with pytest.raises(SettingError, match=r"tune needs rows that will not be edited: set data.warmup_path.*--rows"):
        trainer.tune(editor, stream)
    few = write_stream(tmp_path / "few.jsonl", edit_rows(60)[57:])
    with pytest.raises(SettingError, match="has 3 rows; streams of two turns need at least 4"):
        trainer.tune(editor, stream, rows=few)
    with pytest.raises(SettingError, match="minutes must be positive"):
        trainer.tune(editor, stream, minutes=0)


def test_ctrl_c_keeps_the_best_so_far(tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, stream, trainer = parts
    real, calls = Bench.advance, []

    def advance(self: Bench, stream: Stream, turns: int) -> None:
        calls.append(turns)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, stream, turns)

    monkeypatch.setattr(Bench, "advance", advance)
    found = trainer.tune(editor, stream, out=str(tmp_path / "tuned.yaml"), trials=9)
    assert len(found.streams) == 2 and (tmp_path / "tuned.yaml").exists()
    assert found.best.turns == 2


def test_a_stream_that_is_broken_off_counts_as_far_as_it_was_scored(
    tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, stream, trainer = parts
    real, calls = Bench._apply, []

    def apply(self: Bench, *given: Any) -> None:
        calls.append(given[-1])
        if len(calls) == 4:  # the second turn of the second round
            raise KeyboardInterrupt
        real(self, *given)

    monkeypatch.setattr(Bench, "_apply", apply)
    found = trainer.tune(editor, stream, out=str(tmp_path / "tuned.yaml"), trials=1)
    assert calls == [0, 1, 2, 3] and found.best.turns == 2


def test_sites_are_runs_of_late_layers_of_the_mlp_output() -> None:
    windows = site_windows(tiny_llama(layers=12), 16)
    assert windows[0] == ("model.layers.{6..7}.mlp.down_proj",) and windows[-1] == (
        "model.layers.{10..11}.mlp.down_proj",
    )
    assert site_windows(tiny_llama(layers=2), 16) == [("model.layers.1.mlp.down_proj",)]
    assert site_windows(tiny_llama(layers=2), 17) == []


def test_no_site_set_is_left_out_of_a_short_search() -> None:
    own = Candidate(("a",), 0.1, 0.01, 5)
    order = candidates([("a",), ("b",), ("c",)], own, seed=0)
    assert order[0] == own and len(order) == len(set(order)) == 3 * 27
    assert {candidate.sites for candidate in order[1:4]} == {("a",), ("b",), ("c",)}
    assert candidates([("a",), ("b",)], own, 0) == candidates([("a",), ("b",)], own, 0)


def test_a_step_that_overshoots_is_left_after_its_first_turn(parts: Any, tmp_path: Path) -> None:
    _, stream, trainer = parts
    editor = LifelongEditor(parts[0].base_model, [LLAMA_SITE], relative_step=3e3, passes=4)
    found = trainer.tune(editor, stream, out=str(tmp_path / "tuned.yaml"), trials=3)
    assert found.streams[0].turns == 0 and "the first pass overshoots" in (found.streams[0].failed or "")
    assert found.best is not found.streams[0]


def stream_of(turns: int, failed: str | None = None, **scores: float) -> Stream:
    return Stream(Candidate(("a",), 0.1, 0.01, 5), None, turns=turns, scores=scores, failed=failed)  # type: ignore[arg-type]


def test_the_best_is_the_longest_above_the_floors_with_the_largest_harmonic_mean() -> None:
    high, even = stream_of(4, efficacy=1.0, specificity=0.4), stream_of(4, efficacy=0.6, specificity=0.6)
    short, failed = stream_of(2, efficacy=1.0, specificity=1.0), stream_of(4, failed="bad")
    found = TuneResult([failed, short, high, even], Goal(), "token_match", {})
    assert found.best is even
    assert TuneResult([high, even], Goal({"efficacy": 0.9}), "token_match", {}).best is high
    assert found.front() == [even, high, short]
    worse = stream_of(4, efficacy=0.5, specificity=0.6)
    assert worse not in TuneResult([even, worse], Goal(), "token_match", {}).front()
    with pytest.raises(SettingError, match="no stream of edits came to an end: bad"):
        TuneResult([failed], Goal(), "token_match", {}).suggestion()


def test_rounds_begin_with_two_turns_and_double() -> None:
    assert halving.rounds_of(8) == [2, 4, 8] and halving.rounds_of(5) == [2, 4, 5] and halving.rounds_of(2) == [2]
