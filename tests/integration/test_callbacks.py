"""The callbacks on whole runs: what they write, measure, load and refuse."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import assert_same_state, curves, fit, ledger, results, updates
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.callbacks import (
    EditEvaluation,
    StabilityMonitor,
    StatisticsCheckpoint,
    TurnCheckpoint,
    WarmUp,
)
from stableedit_pl.callbacks.statistics_checkpoint import describe_statistics
from stableedit_pl.errors import SettingError
from stableedit_pl.model.partial_forward import PartialForward

# ---- WarmUp


@pytest.mark.parametrize(
    ("position", "first"), [("start", 0), ("q1", 1), ("middle", 2), ("q3", 3), ("end", 5), ("none", None)]
)
def test_warm_up_comes_where_it_is_put(
    tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str, position: str, first: int | None
) -> None:
    data = {"path": stream_file, "warmup_path": warmup_file}
    fit(tmp_path / "run", llama_folder, data, callbacks=[WarmUp(position=position)])
    turns = {line["turn"]: line["phase"] for line in ledger(tmp_path / "run")}
    expected = ["edit"] * 5
    if first is not None:
        expected[first:first] = ["warmup"] * 2
    assert [turns[turn] for turn in sorted(turns)] == expected


def test_warm_up_is_cut_and_refused(tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str) -> None:
    data = {"path": stream_file, "warmup_path": warmup_file}
    fit(tmp_path / "cut", llama_folder, data, callbacks=[WarmUp(turns=1)])
    assert [line["phase"] for line in ledger(tmp_path / "cut")].count("warmup") == 8
    with pytest.raises(MisconfigurationException, match=r"max_steps=1 ends before the warm-up does \(turn 2\)"):
        fit(tmp_path / "short", llama_folder, data, callbacks=[WarmUp()], trainer={"max_steps": 1})
    with pytest.raises(MisconfigurationException, match="two WarmUp callbacks"):
        fit(tmp_path / "two", llama_folder, data, callbacks=[WarmUp(), WarmUp()])
    with pytest.raises(SettingError, match=r"WarmUp\.turns must be at least 1, got 0"):
        WarmUp(turns=0)


def test_warm_up_statistics_change_what_edits_do(
    tmp_path: Path, llama_folder: str, stream_file: str, warmup_file: str
) -> None:
    cold = fit(tmp_path / "cold", llama_folder, {"path": stream_file})
    data = {"path": stream_file, "warmup_path": warmup_file}
    warm = fit(tmp_path / "warm", llama_folder, data, callbacks=[WarmUp(mode="statistics_only")])
    assert not torch.equal(updates(cold)[LLAMA_SITE], updates(warm)[LLAMA_SITE])


# ---- StatisticsCheckpoint


def test_statistics_are_written_and_start_another_run(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    """A run split by a statistics file alone continues the moments, not the weights."""
    first = fit(tmp_path / "first", llama_folder, {"path": stream_file})
    file = tmp_path / "first/statistics.safetensors"
    saved = load_file(file)
    for name, tensor in first.state.statistics.tensors().items():
        assert torch.equal(saved[name], tensor)
    about = describe_statistics(file)
    assert about["turns"] == "5" and json.loads(about["fingerprint"])["sites"] == [LLAMA_SITE]
    second = fit(
        tmp_path / "second", llama_folder, {"path": stream_file}, callbacks=[StatisticsCheckpoint(load_from=str(file))]
    )
    assert second.state.statistics.gradients[LLAMA_SITE].count == 2 * first.state.statistics.gradients[LLAMA_SITE].count
    assert not torch.equal(updates(second)[LLAMA_SITE], updates(first)[LLAMA_SITE])


def test_statistics_are_loaded_once_not_again_on_resume(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    fit(tmp_path / "source", llama_folder, {"path": stream_file}, trainer={"max_steps": 2})
    load_from = str(tmp_path / "source/statistics.safetensors")

    def run(name: str, steps: int, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        callbacks = [StatisticsCheckpoint(load_from=load_from)]
        return fit(tmp_path / name, llama_folder, {"path": stream_file}, callbacks=callbacks,
                   trainer={"max_steps": steps}, ckpt_path=ckpt_path).state_dict()  # fmt: skip

    whole = run("whole", 4)
    run("parts", 2)
    assert_same_state(run("parts", 4, "last"), whole)


def test_statistics_of_other_sites_are_refused_by_name(
    tmp_path: Path, llama_folder: str, gpt2_folder: str, stream_file: str
) -> None:
    fit(tmp_path / "gpt2", gpt2_folder, {"path": stream_file}, {"sites": ["transformer.h.1.mlp.c_fc"]},
        trainer={"max_steps": 1})  # fmt: skip
    wrong = StatisticsCheckpoint(load_from=str(tmp_path / "gpt2/statistics.safetensors"))
    with pytest.raises(ValueError, match="do not fit this run's sites") as refused:
        fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[wrong])
    assert LLAMA_SITE in str(refused.value) and "transformer.h.1.mlp.c_fc" in str(refused.value)
    with pytest.raises(SettingError, match=r"load_from: there is no file .*nowhere"):
        missing = StatisticsCheckpoint(load_from=str(tmp_path / "nowhere"))
        fit(tmp_path / "run2", llama_folder, {"path": stream_file}, callbacks=[missing])


# ---- EditEvaluation


def test_retained_scores_are_of_past_edits_on_a_fixed_sample(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """The curve's last point, on a sample as large as the stream, is the final score; it has a point every 2 turns."""
    callbacks = [EditEvaluation(every_n_turns=1, sample_size=100)]
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, {"step_size": 2e-2}, callbacks=callbacks)
    found, points = results(tmp_path / "run"), curves(tmp_path / "run")
    retained = points["editing/retained_efficacy"]
    assert [step for step, _ in retained] == [1, 2, 3, 4, 5]
    assert retained[-1][1] == pytest.approx(found["retained"]["efficacy"], abs=1e-6)
    first_turn = [line["at_edit"] for line in ledger(tmp_path / "run") if line["turn"] == 0]
    assert retained[0][1] == pytest.approx(sum(first_turn) / 8, abs=1e-6), "after turn 1 only its edits are past"
    assert points["editing/base_specificity"] == [(0, 1.0)]
    assert [step for step, _ in points["editing/at_edit_efficacy"]] == [1, 2, 3, 4, 5]


def test_other_rules_are_listed_beside_the_editors_own(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    callbacks = [EditEvaluation(None, also_score=["greedy_match", "exact_match", "token_match"])]
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, {"step_size": 2e-2}, callbacks=callbacks)
    found = results(tmp_path / "run")
    assert set(found["other_rules"]) == {"greedy_match", "exact_match"}
    exact = found["other_rules"]["exact_match"]["retained"]["efficacy"]
    assert found["other_rules"]["greedy_match"]["retained"]["efficacy"] == pytest.approx(exact)
    assert exact <= found["retained"]["efficacy"]
    assert found["measured"]["rule"].startswith("token_match")


def test_evaluation_does_not_change_the_run(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    plain = fit(tmp_path / "plain", llama_folder, {"path": stream_file})
    watched = fit(
        tmp_path / "watched", llama_folder, {"path": stream_file}, callbacks=[EditEvaluation(1, 10), StabilityMonitor()]
    )
    assert_same_state(plain.state_dict(), watched.state_dict())


# ---- StabilityMonitor


def test_reused_lower_layers_change_no_score(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, at-edit and retained scores, and losses after, against runs in which every layer runs every time."""

    def run(name: str, megabytes: float) -> tuple[int, dict[str, Any]]:
        passes: list[int] = []
        forward = PartialForward.logits
        monkeypatch.setattr(
            PartialForward,
            "logits",
            lambda self, batch, lower=None: passes.append(lower is None) or forward(self, batch, lower),
        )
        evaluation = EditEvaluation(every_n_turns=1, sample_size=12, reuse_megabytes=megabytes)
        fit(tmp_path / name, llama_folder, {"path": stream_file}, callbacks=[evaluation])
        monkeypatch.setattr(PartialForward, "logits", forward)
        scores = {k: v for k, v in results(tmp_path / name).items() if k in ("base", "at_edit", "retained")}
        after = [line["loss_after"] for line in ledger(tmp_path / name)]
        editing = {tag: points for tag, points in curves(tmp_path / name).items() if tag.startswith("editing/re")}
        return sum(passes), {"scores": scores, "after": after, "curves": editing}

    in_full, everything = run("plain", 0)
    with monkeypatch.context() as patch:
        patch.setattr("stableedit_pl.model.partial_forward._layers_below", lambda model, sites: ())
        _, never = run("never", 0)
    fewer, reused = run("reused", 100)
    assert 0 < fewer < 0.7 * in_full  # the captures, and every prompt once
    assert reused["scores"] == everything["scores"] == never["scores"]
    assert reused["curves"] == everything["curves"] == never["curves"]
    assert reused["after"] == pytest.approx(never["after"], rel=1e-4)


def test_stability_curves_equal_dense_recomputation(tmp_path: Path, llama_bf16_folder: str, stream_file: str) -> None:
    """Norms and cosines recomputed from the masters of runs that stop at each turn."""
    fit(tmp_path / "run", llama_bf16_folder, {"path": stream_file}, callbacks=[StabilityMonitor()])
    found = curves(tmp_path / "run")
    sums = [torch.zeros(16, 32, dtype=torch.float64)]
    for turn in range(1, 6):
        editor = fit(tmp_path / f"to{turn}", llama_bf16_folder, {"path": stream_file}, trainer={"max_steps": turn})
        sums.append(updates(editor)[LLAMA_SITE])
        original = editor.sites[0].original.double()
    deltas = [after - before for before, after in itertools.pairwise(sums)]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    def curve(name: str) -> list[float]:
        return [value for _, value in found[f"{name}/{LLAMA_SITE}"]]

    assert curve("stability/update_norm") == pytest.approx([float(d.norm()) for d in deltas], rel=1e-3)
    ratios = [float((original + total).norm() / original.norm()) for total in sums[1:]]
    assert curve("stability/weight_norm_ratio") == pytest.approx(ratios, rel=1e-5)
    consecutive = [cosine(a, b) for a, b in zip(deltas[1:], deltas, strict=False)]
    assert curve("stability/cosine_to_previous") == pytest.approx(consecutive, abs=1e-3)
    to_sum = [cosine(delta, before) for delta, before in zip(deltas[1:], sums[1:], strict=False)]
    assert curve("stability/cosine_to_sum") == pytest.approx(to_sum, abs=1e-3)
    assert all(0.0 < value < 2.0 and value != 1.0 for value in curve("stability/survived"))
    answer_tokens = [sum(len(row["target"].split()) for row in edit_rows(33)[: 8 * t]) for t in range(1, 6)]
    assert curve("normalization/rows") == answer_tokens
    largest, smallest = curve("normalization/largest_eigenvalue"), curve("normalization/smallest_eigenvalue")
    ratio = [a / b for a, b in zip(largest, smallest, strict=True)]
    assert curve("normalization/condition_number") == pytest.approx(ratio, rel=1e-5)


def test_everything_survives_in_float32(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[StabilityMonitor(every_n_turns=2)])
    points = curves(tmp_path / "run")[f"stability/survived/{LLAMA_SITE}"]
    assert [step for step, _ in points] == [2, 4]
    assert [value for _, value in points] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_stability_curves_are_the_same_whoever_takes_the_root(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """Quadrature knows no eigenvalues; the monitor finds them for itself, and only on the turns that it logs."""
    found = {}
    for solver in ("eigh", "quadrature"):
        monitor = StabilityMonitor(every_n_turns=2)
        fit(tmp_path / solver, llama_folder, {"path": stream_file}, {"whitening_solver": solver}, callbacks=[monitor])
        found[solver] = {
            name: points
            for name, points in curves(tmp_path / solver).items()
            if name.startswith(("stability/", "normalization/"))
        }
    assert found["eigh"].keys() == found["quadrature"].keys()
    assert f"normalization/condition_number/{LLAMA_SITE}" in found["eigh"]
    for name, points in found["eigh"].items():
        assert [step for step, _ in points] == [step for step, _ in found["quadrature"][name]] == [2, 4]
        assert [v for _, v in points] == pytest.approx([v for _, v in found["quadrature"][name]], rel=1e-4, abs=1e-4)


# ---- TensorBoard


def test_tensorboard_has_layout_settings_results_and_hparams(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[StabilityMonitor()])
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode("utf-8", "ignore")
    for group in ("1 editing", "3 stability", "4 normalization", "5 cost"):
        assert group in layout
    texts = {tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")}
    assert texts == {"settings/text_summary", "results/text_summary"}
    table = events.Tensors("results/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"{results(tmp_path / 'run')['retained']['efficacy']:.3f}" in table
    assert "final/retained_efficacy" in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    steps = {step for tag, points in curves(tmp_path / "run").items() if "/" in tag for step, _ in points}
    assert steps <= set(range(7)), "the final scores stand one step past the last turn"


# ---- TurnCheckpoint


def test_checkpoints_are_pruned_and_last_is_the_newest(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[TurnCheckpoint(every_n_turns=1, keep=2)])
    folder = tmp_path / "run/checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "turn=4.ckpt", "turn=5.ckpt"]
    assert (folder / "last.ckpt").read_bytes() == (folder / "turn=5.ckpt").read_bytes()
    by_time = TurnCheckpoint(every_n_turns=None, every_n_minutes=1e-9, keep=9)
    fit(tmp_path / "timed", llama_folder, {"path": stream_file}, callbacks=[by_time])
    assert len(list((tmp_path / "timed/checkpoints").glob("turn=*.ckpt"))) == 6  # position 0, then each turn


# ---- all of them together


def test_memory_does_not_grow_with_turns(tmp_path: Path, llama_folder: str) -> None:
    """Promise 5 by counting: no tensor is left over by ten more turns."""
    import gc

    counts = []

    class Count(EditEvaluation):
        def on_train_batch_end(self, *args: object) -> None:
            super().on_train_batch_end(*args)  # type: ignore[arg-type]
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))

    stream = write_stream(tmp_path / "long.jsonl", edit_rows(60))
    callbacks = [Count(every_n_turns=2, sample_size=5), StabilityMonitor()]
    fit(tmp_path / "run", llama_folder, {"path": stream, "turn_size": 2}, callbacks=callbacks)
    assert len(counts) == 30
    assert max(counts[-10:]) <= max(counts[10:20])
