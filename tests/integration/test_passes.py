"""Passes, relative settings and a warm-up from the stream itself, on whole runs: what is recorded, and said."""

from pathlib import Path

import pytest
import torch
from edit_runs import assert_same_state, curves, fit, ledger, results, saved_state
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.callbacks import EditEvaluation, ProtectedDirections, RunAdvice, WarmUp, run_advice
from stableedit_pl.cli.verify import verify_run
from stableedit_pl.errors import IncompatibleCheckpoint, SettingError
from stableedit_pl.run.files.checkpoint_file import read_checkpoint

RELATIVE = {"step_size": None, "ridge": None, "relative_step": 0.1, "relative_ridge": 0.05}
OWN = {"mode": "statistics_only"}


def test_statistics_are_fed_from_the_streams_own_turns_and_count_their_rows_once(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """Hidden size 16: two rows each are 32 answer tokens, which the stream's first three turns of 8 hold."""
    run = tmp_path / "run"
    editor = fit(run, llama_folder, {"path": stream_file}, callbacks=[WarmUp(**OWN)])
    lines = ledger(run)
    fed = [line for line in lines if line["phase"] == "warmup"]
    edited = [line for line in lines if line["phase"] == "edit"]
    assert [line["id"] for line in edited] == [f"e0-{i}" for i in range(33)]
    turns = len({line["turn"] for line in fed})
    assert [line["id"] for line in fed] == [f"e0-{i}" for i in range(8 * turns)]
    plain = fit(tmp_path / "plain", llama_folder, {"path": stream_file})
    rows = plain.state.statistics.gradients[LLAMA_SITE].count
    assert editor.state.statistics.gradients[LLAMA_SITE].count == rows, "each row once"
    first = fit(tmp_path / "fed", llama_folder, {"path": stream_file}, callbacks=[WarmUp(**OWN)],
                trainer={"max_steps": turns})  # fmt: skip
    fewer = fit(tmp_path / "fewer", llama_folder, {"path": stream_file}, callbacks=[WarmUp(**OWN, turns=turns - 1)],
                trainer={"max_steps": turns - 1})  # fmt: skip
    assert first.state.statistics.gradients[LLAMA_SITE].count >= 32
    assert fewer.state.statistics.gradients[LLAMA_SITE].count < 32
    found = results(run)
    assert (found["edits"], found["warmup_turns"], found["settings"]["warm_up"]["own_stream"]) == (33, turns, True)
    assert verify_run(str(run)).problems == []


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_it_resumes_exactly_though_the_stream_grew(tmp_path: Path, llama_folder: str, stop: int) -> None:
    """A longer stream would have been fed from more of its turns: those that the run began with count."""
    rows = edit_rows(40)
    short, long = write_stream(tmp_path / "short.jsonl", rows[:16]), write_stream(tmp_path / "long.jsonl", rows)
    warm = lambda: [WarmUp(**OWN)]  # noqa: E731
    turns = 2  # all of the short stream, and too few
    fit(tmp_path / "run", llama_folder, {"path": short}, RELATIVE, callbacks=warm(), trainer={"max_steps": stop})
    grown = {"path": long}
    fit(tmp_path / "run", llama_folder, grown, RELATIVE, callbacks=warm(), ckpt_path="last")
    fit(tmp_path / "whole", llama_folder, grown, RELATIVE, callbacks=[WarmUp(**OWN, turns=turns)])
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))
    ids = [(line["id"], line["phase"]) for line in ledger(tmp_path / "run")]
    assert ids == [(line["id"], line["phase"]) for line in ledger(tmp_path / "whole")]


def test_rows_of_a_rejected_warm_up_turn_count_when_they_are_edited(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stableedit_pl.editor import LifelongEditor

    real = LifelongEditor.training_step

    def training_step(self: LifelongEditor, turn: object, batch_idx: int) -> torch.Tensor:
        loss = real(self, turn, batch_idx)  # type: ignore[arg-type]
        if batch_idx == 0 and self.trainer.global_step == 0:
            assert self._captured is not None
            self._captured.rows[LLAMA_SITE].keys[0, 0] = float("nan")
        return loss

    plain = fit(tmp_path / "plain", llama_folder, {"path": stream_file})
    monkeypatch.setattr(LifelongEditor, "training_step", training_step)
    editor = fit(tmp_path / "run", llama_folder, {"path": stream_file}, {"bad_turns": "skip"}, [WarmUp(**OWN)])
    assert editor.state.rejected_turns == [0]
    counts = [one.state.statistics.gradients[LLAMA_SITE].count for one in (editor, plain)]
    assert counts[0] == counts[1]


def test_edits_cannot_be_taken_from_the_stream_itself(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    for settings in ({"mode": "edit"}, {"mode": "statistics_only", "position": "middle"}):
        with pytest.raises(SettingError, match=r"set data.warmup_path. Without one it can feed the statistics"):
            fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[WarmUp(**settings)])


def test_relative_settings_become_numbers_once_and_are_written_down_everywhere(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    printed: list[str] = []
    monkeypatch.setattr(run_advice, "rank_zero_info", printed.append)
    editor = fit(run, llama_folder, {"path": stream_file}, RELATIVE, callbacks=[EditEvaluation(None)])
    scale = editor.state.scales[LLAMA_SITE]
    assert scale.step_size > 0 and scale.ridge > 0
    plain = {LLAMA_SITE: {"step_size": scale.step_size, "ridge": scale.ridge}}
    assert results(run)["scales"] == plain
    assert read_checkpoint(run / "checkpoints/last.ckpt")["stableedit"]["scales"] == plain
    marked = [line for line in ledger(run) if "scales" in line]
    assert [line["scales"] for line in marked] == [plain]
    assert {line["passes"] for line in ledger(run)} == {4} and results(run)["passes"] == 4
    (said,) = printed
    assert f"became step_size {scale.step_size:.4g}" in said and "relative_step 0.1 and relative_ridge 0.05" in said
    points = curves(run)
    losses = [[value for _, value in points[f"passes/loss_{number}"]] for number in (1, 2, 3, 4)]
    assert all(later < earlier for earlier, later in zip(losses[0], losses[3], strict=True))
    assert [value for _, value in points["passes/used"]] == [4.0] * 5
    before = [value for _, value in points["editing/loss_before"]]
    assert losses[0] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_with_relative_settings_resumes_exactly(
    tmp_path: Path, llama_folder: str, stream_file: str, stop: int
) -> None:
    fit(tmp_path / "whole", llama_folder, {"path": stream_file}, RELATIVE)
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, RELATIVE, trainer={"max_steps": stop})
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, RELATIVE, ckpt_path="last")
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole"))
    for other in ({"relative_step": 0.2}, {"passes": 3}, {"enough_margin": 0.9}):
        with pytest.raises(IncompatibleCheckpoint, match=next(iter(other))):
            fit(tmp_path / "run", llama_folder, {"path": stream_file}, {**RELATIVE, **other}, ckpt_path="last")


@pytest.mark.parametrize(
    ("step", "said"), [(1e-4, "is too small; raise it"), (3e2, "is too large, it overshoots; lower it")]
)
def test_a_step_that_does_nothing_or_too_much_is_told_apart(
    tmp_path: Path, llama_folder: str, stream_file: str, step: float, said: str
) -> None:
    with pytest.warns(UserWarning, match=rf"model.relative_step={step:g} {said}") as warned:
        fit(tmp_path / "run", llama_folder, {"path": stream_file}, {**RELATIVE, "relative_step": step},
            callbacks=[RunAdvice(after_turns=2)])  # fmt: skip
    told = [str(one.message) for one in warned if "right after their turn" in str(one.message)]
    assert "over all 5 editing turns" in told[-1]
    assert len(told) == (2 if step < 1 else 1), "early and at the end, once each; far too large a step scores by chance"


def test_advice_compares_scores_of_one_rule(
    tmp_path: Path, llama_folder: str, stream_file: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Whole answers, none before and some after: the tokens that were right before are no measure of that."""
    model = {**RELATIVE, "relative_step": 0.5, "scoring": "exact_match"}
    advice = RunAdvice(after_turns=1, specificity_bound=0)
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, model, callbacks=[advice])
    known = [line["known_before"] for line in ledger(tmp_path / "run")]
    assert advice.state_dict()["before"] == pytest.approx(sum(sum(known[i : i + 8]) / len(known[i : i + 8])
                                                              for i in range(0, 33, 8)))  # fmt: skip
    assert not [one for one in recwarn if "right after their turn" in str(one.message)]


def test_lost_specificity_is_said_once_and_a_good_run_says_nothing(
    tmp_path: Path, llama_folder: str, stream_file: str, recwarn: pytest.WarningsRecorder
) -> None:
    strong = {**RELATIVE, "relative_step": 1.0}
    callbacks = lambda bound: [EditEvaluation(1, 33), RunAdvice(specificity_bound=bound)]  # noqa: E731
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, strong, callbacks=callbacks(0.99))
    told = [str(one.message) for one in recwarn if "Retained specificity" in str(one.message)]
    assert len(told) == 1 and "below 0.99" in told[0]
    recwarn.clear()
    fit(tmp_path / "good", llama_folder, {"path": stream_file}, RELATIVE, callbacks=callbacks(0.01))
    assert not [one for one in recwarn if "model." in str(one.message)]


# ---- protected directions


def test_protected_directions_keep_unrelated_answers_and_resume_exactly(
    tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str
) -> None:
    data = {"path": stream_file, "warmup_path": warmup_file}
    strong = {**RELATIVE, "relative_step": 0.5}
    callbacks = lambda **more: [WarmUp(mode="statistics_only"), ProtectedDirections(weight=1.0, **more)]  # noqa: E731
    fit(tmp_path / "plain", llama_folder, data, strong, callbacks=[WarmUp(mode="statistics_only")])
    fit(tmp_path / "whole", llama_folder, data, strong, callbacks=callbacks())
    scores = [results(tmp_path / name)["retained"]["specificity"] for name in ("plain", "whole")]
    assert scores[1] > scores[0]
    for stop in (1, 4):
        run = tmp_path / f"run{stop}"
        fit(run, llama_folder, data, strong, callbacks=callbacks(), trainer={"max_steps": 2 + stop})
        fit(run, llama_folder, data, strong, callbacks=callbacks(), ckpt_path="last")
        assert_same_state(saved_state(run), saved_state(tmp_path / "whole"))
    other_text = tmp_path / "other.txt"
    other_text.write_text("w1 w2 w3 w4\n")
    for more in ({"rank": 3}, {"path": str(other_text)}):
        with pytest.raises(IncompatibleCheckpoint, match=r"the run has ProtectedDirections with .*'rank': 512"):
            fit(run, llama_folder, data, strong, callbacks=callbacks(**more), ckpt_path="last")
    with pytest.raises(IncompatibleCheckpoint, match="add the callback as it was"):
        fit(run, llama_folder, data, strong, callbacks=[WarmUp(mode="statistics_only")], ckpt_path="last")
    with pytest.raises(IncompatibleCheckpoint, match="began without ProtectedDirections"):
        fit(tmp_path / "plain", llama_folder, data, strong, callbacks=callbacks(), trainer={"max_steps": 9},
            ckpt_path="last")  # fmt: skip


def test_the_protected_text_may_be_a_file_of_lines(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5\n\nw9 w8 w7 w6\n")
    editor = fit(tmp_path / "run", llama_folder, {"path": stream_file}, RELATIVE,
                 callbacks=[ProtectedDirections(path=str(text))])  # fmt: skip
    assert 0 < len(editor.state.guards[LLAMA_SITE].energies) <= 9
    with pytest.raises(SettingError, match="ProtectedDirections needs text that is not edited"):
        fit(tmp_path / "other", llama_folder, {"path": stream_file}, RELATIVE, callbacks=[ProtectedDirections()])
    text.write_text("\n \n")
    with pytest.raises(SettingError, match=r"text.txt has no line of text"):
        fit(tmp_path / "empty", llama_folder, {"path": stream_file}, RELATIVE,
            callbacks=[ProtectedDirections(path=str(text))])  # fmt: skip
