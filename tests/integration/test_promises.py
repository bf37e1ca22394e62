"""DESIGN's promises 1, 3, 4, 5 and 7, on whole runs."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from edit_runs import PASSES, assert_same_state, fit, ledger, results, saved_state, updates
from tiny import LLAMA_SITE, edit_rows, relative_difference, write_stream

from stableedit_pl import EditStream, EditTrainer, LifelongEditor
from stableedit_pl.callbacks import EditEvaluation, WarmUp
from stableedit_pl.method.planning import BadTurn

SITES = {"llama_folder": ["model.layers.0.mlp.down_proj", LLAMA_SITE], "gpt2_folder": ["transformer.h.*.mlp.c_proj"]}


@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
@pytest.mark.parametrize("folder", ["llama_folder", "gpt2_folder"])
def test_weights_do_not_depend_on_micro_batches_padding_or_order(
    tmp_path: Path, request: pytest.FixtureRequest, folder: str, normalization: str
) -> None:
    base, rows = request.getfixturevalue(folder), edit_rows(33)
    step = 0.1 if normalization == "none" else 1e-3
    model = {"sites": SITES[folder], "normalization": normalization, "step_size": step}
    shuffled = []
    for start in range(0, len(rows), 8):
        turn = rows[start : start + 8]
        random.Random(start).shuffle(turn)
        shuffled += turn
    plain = write_stream(tmp_path / "plain.jsonl", rows)
    orders = {"plain": plain, "shuffled": write_stream(tmp_path / "shuffled.jsonl", shuffled)}
    reference = updates(fit(tmp_path / "reference", base, {"path": plain, "micro_batch_size": 1}, model))
    variants = [("plain", 3), ("plain", 10), ("plain", 100), ("shuffled", 3), ("shuffled", 100)]
    for order, size in variants:
        found = updates(
            fit(tmp_path / f"{order}{size}", base, {"path": orders[order], "micro_batch_size": size}, model)
        )
        for name, update in found.items():
            assert relative_difference(update, reference[name]) < 2e-5, (order, size, name)


def test_micro_batch_mean_does_depend_on_micro_batches(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """Negative control for the test above."""
    model = {"loss_reduction": "micro_batch_mean"}
    one = updates(fit(tmp_path / "one", llama_folder, {"path": stream_file, "micro_batch_size": 1}, model))
    three = updates(fit(tmp_path / "three", llama_folder, {"path": stream_file, "micro_batch_size": 3}, model))
    assert relative_difference(one[LLAMA_SITE], three[LLAMA_SITE]) > 1e-2


def test_the_short_last_turn_is_applied(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    editor = fit(tmp_path / "run", llama_folder, {"path": stream_file})
    lines = ledger(tmp_path / "run")
    assert [line["id"] for line in lines] == [f"e0-{i}" for i in range(33)]
    assert [line["turn"] for line in lines] == [i // 8 for i in range(33)]
    assert editor.state.committed_turns == editor.trainer.global_step == 5
    assert lines[-1]["loss_after"] < lines[-1]["loss_before"]
    assert results(tmp_path / "run")["edits"] == 33


@pytest.mark.parametrize(("number", "where"), [(0, ""), (2, " in a further pass")])
def test_a_bad_turn_leaves_the_previous_turns_state(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """A value gradient that is not finite in a pass of turn 3 stops the run with the state after turn 2."""
    from stableedit_pl import editor as module
    from stableedit_pl.model import shared_capture as shares

    clean = fit(tmp_path / "clean", llama_folder, {"path": stream_file}, trainer={"max_steps": 3})
    real, seen = shares.capture, []

    def poisoned(*args: object, **kwargs: object) -> object:
        captured = real(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(captured)
        if len(seen) == 3 * PASSES + number + 1:
            captured.rows[LLAMA_SITE].gradients[0, 0] = float("nan")
        return captured

    monkeypatch.setattr(shares, "capture", poisoned)
    editors = []
    monkeypatch.setattr(module.LifelongEditor, "on_exception", lambda self, e: None, raising=False)
    original = module.LifelongEditor.on_fit_start
    monkeypatch.setattr(module.LifelongEditor, "on_fit_start", lambda self: (editors.append(self), original(self))[1])
    with pytest.raises(BadTurn, match=rf"value gradients of site {LLAMA_SITE} are not finite{where}"):
        fit(tmp_path / "bad", llama_folder, {"path": stream_file})
    assert editors[0].state.committed_turns == 3
    assert_same_state(editors[0].state_dict(), clean.state_dict())
    assert len(ledger(tmp_path / "bad")) == 24


def test_warm_up_turns_are_marked_and_not_scored(
    tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str
) -> None:
    data = {"path": stream_file, "warmup_path": warmup_file}
    run = tmp_path / "run"
    fit(run, llama_folder, data, callbacks=[WarmUp(position="middle", mode="statistics_only"), EditEvaluation(2, 10)])
    lines = ledger(run)
    phases = [line["phase"] for line in lines]
    assert phases == ["edit"] * 16 + ["warmup"] * 14 + ["edit"] * 17
    assert all(line["at_edit"] is None for line in lines if line["phase"] == "warmup")
    assert all(line["loss_after"] == line["loss_before"] for line in lines if line["phase"] == "warmup")
    found = results(run)
    assert (found["edits"], found["turns"], found["warmup_turns"]) == (33, 7, 2)
    scored = [line["at_edit"] for line in lines if line["phase"] == "edit"]
    assert found["at_edit"]["efficacy"] == pytest.approx(sum(scored) / 33)


def test_warm_up_by_edits_changes_weights(
    tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str
) -> None:
    data = {"path": stream_file, "warmup_path": warmup_file}
    trainer = {"max_steps": 2}
    edited = fit(tmp_path / "a", llama_folder, data, callbacks=[WarmUp()], trainer=trainer)
    silent = fit(tmp_path / "b", llama_folder, data, callbacks=[WarmUp(mode="statistics_only")], trainer=trainer)
    assert updates(edited)[LLAMA_SITE].norm() > 0
    assert updates(silent)[LLAMA_SITE].norm() == 0
    assert edited.state.statistics.gradients[LLAMA_SITE].count == silent.state.statistics.gradients[LLAMA_SITE].count


def test_bfloat16_edits_accumulate_in_a_float32_master(
    tmp_path: Path, llama_bf16_folder: str, stream_file: str
) -> None:
    """The checkpoint holds the master; the model runs on its rounding; master_dtype: model has no master."""
    editor = fit(tmp_path / "run", llama_bf16_folder, {"path": stream_file})
    site = editor.sites[0]
    assert site.weight.dtype == torch.bfloat16 and site.master is not None
    assert torch.equal(site.master.bfloat16(), site.weight)
    assert not torch.equal(site.master, site.weight.float())
    saved = saved_state(tmp_path / "run")[f"model.{LLAMA_SITE}.weight"]
    assert saved.dtype == torch.float32 and torch.equal(saved, site.master)
    coarse = fit(tmp_path / "coarse", llama_bf16_folder, {"path": stream_file}, {"master_dtype": "model"})
    assert coarse.sites[0].master is None
    assert saved_state(tmp_path / "coarse")[f"model.{LLAMA_SITE}.weight"].dtype == torch.bfloat16


def test_scores_are_taken_as_their_names_say(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """Base specificity is agreement with itself; base efficacy equals what an unedited model scores."""
    model = {"step_size": 2e-2}
    editor = fit(tmp_path / "run", llama_folder, {"path": stream_file}, model, callbacks=[EditEvaluation(1, 33)])
    found = results(tmp_path / "run")
    assert found["base"]["specificity"] == 1.0
    with editor.base_weights():
        scores = editor.trainer.test(editor, datamodule=editor.trainer.datamodule, verbose=False)[0]
    assert scores["efficacy"] == pytest.approx(found["base"]["efficacy"], abs=1e-6)
    after = editor.trainer.test(editor, datamodule=editor.trainer.datamodule, verbose=False)[0]
    assert after["efficacy"] == pytest.approx(found["retained"]["efficacy"], abs=1e-6)
    assert found["retained"]["efficacy"] > found["base"]["efficacy"]
    assert "original weights" in found["measured"]["base"]
    digest = hashlib.sha256(Path(stream_file).read_bytes()).hexdigest()
    assert found["settings"]["checksums"]["path_sha256"] == digest


def test_a_model_edited_in_memory_is_scored_like_one_from_a_checkpoint(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """Right after ``fit``, in the same process: the run's own final scores; specificity is the one at stake."""

    def scored(editor: LifelongEditor, ckpt_path: str | None = None) -> dict[str, float]:
        trainer = EditTrainer(run_dir=str(tmp_path / "run"), accelerator="cpu", enable_progress_bar=False)
        return dict(trainer.test(editor, datamodule=EditStream(path=stream_file), ckpt_path=ckpt_path)[0])

    def new() -> LifelongEditor:
        return LifelongEditor(**editor.hparams)

    editor = fit(tmp_path / "run", llama_folder, {"path": stream_file}, {"step_size": 1e-2})
    retained = results(tmp_path / "run")["retained"]
    unedited = new()
    assert scored(unedited)["specificity"] != pytest.approx(retained["specificity"], abs=1e-4)
    assert not unedited.edits_scored and unedited.specificity_measured_by == "stated_answer"
    for edited, ckpt_path in ((editor, None), (new(), "last")):
        assert scored(edited, ckpt_path) == pytest.approx(retained, abs=1e-6)
        assert edited.edits_scored and edited.specificity_measured_by == "base_output"
    with editor.base_weights():
        assert not editor.is_edited()
    assert editor.is_edited()


def test_the_base_model_on_disk_is_never_written(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    def contents() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in Path(llama_folder).iterdir()}

    before = contents()
    fit(tmp_path / "run", llama_folder, {"path": stream_file})
    assert contents() == before


def test_a_no_op_edit_is_applied_and_counted(tmp_path: Path, llama_folder: str) -> None:
    """An edit whose target the model already gives has its line, its rows in the moments, and a count."""
    from tiny import WORDS, tiny_llama, word_tokenizer

    tokenizer, model = word_tokenizer(), tiny_llama()
    answers = {
        word: tokenizer.decode(model(torch.tensor([[1, *tokenizer(word)["input_ids"][1:]]])).logits[0, -1].argmax())
        for word in WORDS
    }
    prompt = next(word for word, answer in answers.items() if answer in WORDS)
    rows = [{"id": "same", "prompt": prompt, "target": answers[prompt]}, *edit_rows(7)]
    editor = fit(tmp_path / "run", llama_folder, {"path": write_stream(tmp_path / "s.jsonl", rows)})
    assert next(line["known_before"] for line in ledger(tmp_path / "run")) is True
    assert results(tmp_path / "run")["known_before"] >= 1
    answer_tokens = sum(len(row["target"].split()) for row in rows)
    assert editor.state.statistics.keys[LLAMA_SITE].count == answer_tokens
