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
from tiny import LLAMA_SITE, edit_rows, relative_difference, tiny_llama, write_stream

from stableedit_pl import editable_model
from stableedit_pl.callbacks import (
    DevicePlacement,
    EditEvaluation,
    StabilityMonitor,
    StatisticsCheckpoint,
    TurnCheckpoint,
    WarmUp,
    device_placement,
)
from stableedit_pl.callbacks.device_placement import existing_device
from stableedit_pl.callbacks.statistics_checkpoint import describe_statistics
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.memory import planned_bytes
from stableedit_pl.partial_forward import PartialForward
from stableedit_pl.placement import HOST, PlacementError, size
from stableedit_pl.rank_devices import as_device
from stableedit_pl.stream import EditStream
from stableedit_pl.trainer import EditTrainer

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
        patch.setattr("stableedit_pl.partial_forward._layers_below", lambda model, sites: ())
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
    for group in ("1 editing", "2 stability", "3 normalization", "4 cost"):
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


# ---- DevicePlacement

GPU = [torch.device("cuda", index) for index in range(2)]
TWO_SITES = {"sites": ["model.layers.0.mlp.down_proj", LLAMA_SITE]}


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded all the same fails the test."""
    monkeypatch.setattr(editable_model, "load_language_model", lambda *a, **k: pytest.fail("the model was loaded"))


class Loading(Exception):
    """Thrown where the model would be loaded: everything before was fine."""


def planned(
    tmp_path: Path, base_model: str, stream: str, monkeypatch: pytest.MonkeyPatch, free: list[float], **settings: Any
) -> LifelongEditor:
    """The editor of a run on two invented GPUs, stopped where the model would be loaded; ``free``: theirs, the host."""
    editor = LifelongEditor(base_model=base_model, step_size=1e-3, ridge=1.0, **TWO_SITES)

    def load(*args: Any) -> None:
        raise Loading

    monkeypatch.setattr(editable_model, "load_language_model", load)
    monkeypatch.setattr(device_placement, "rank_devices", lambda trainer: GPU)
    monkeypatch.setattr(device_placement, "accelerators", lambda: GPU)
    monkeypatch.setattr(device_placement, "as_device", lambda name: as_device(0 if str(name) == "cpu" else name))
    space = {**dict(zip(GPU, free, strict=False)), HOST: free[2]}
    monkeypatch.setattr(device_placement, "free_bytes", lambda devices, sharing: [space[one] for one in devices])
    callbacks = [DevicePlacement(headroom=0.0, **settings), EditEvaluation(every_n_turns=None)]
    trainer = EditTrainer(run_dir=str(tmp_path / "run"), accelerator="cpu", enable_progress_bar=False,
                          callbacks=callbacks)  # fmt: skip
    with pytest.raises(Loading):
        trainer.fit(editor, datamodule=EditStream(path=stream, turn_size=8))
    return editor


def test_state_is_spread_over_gpus_before_anything_is_loaded(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model on the first device, its two sites' state in turn on both, or on the one that is named."""
    room = [1e9, 1e9, 1e9]
    spread = planned(tmp_path, llama_folder, stream_file, monkeypatch, room, editor_device="spread")
    assert list(spread.state_devices.values()) == GPU and spread.device_map is None
    named = planned(tmp_path, llama_folder, stream_file, monkeypatch, room, editor_device="cuda:1")
    assert list(named.state_devices.values()) == [GPU[1]] * 2
    listed = planned(tmp_path, llama_folder, stream_file, monkeypatch, room, editor_device=["cuda:1", "cuda:0"])
    assert list(listed.state_devices.values()) == GPU[::-1]
    beside = planned(tmp_path, llama_folder, stream_file, monkeypatch, room)
    assert list(beside.state_devices.values()) == [GPU[0]] * 2


def test_a_model_is_spread_by_accelerate_with_room_for_the_editor(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map that was planned with is the one that the model is loaded with."""
    editor = planned(tmp_path, llama_folder, stream_file, monkeypatch, [5e5, 5e5, 1e9], device_map="auto")
    assert set(editor.device_map.values()) == {0, 1}
    explicit = {"": 0, "model.layers.1": "cuda:1"}
    editor = planned(tmp_path, llama_folder, stream_file, monkeypatch, [1e9, 1e9, 1e9], device_map=explicit)
    assert editor.device_map == {"": 0, "model.layers.1": 1}
    assert list(editor.state_devices.values()) == GPU


def test_host_memory_is_the_last_resort_and_says_what_it_costs(
    tmp_path: Path, llama_folder: str, stream_file: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """8 edits of one or two answer tokens; 2 sites of 32 x 16 in float32, so that factors come back."""
    needs = planned_bytes([(32, 16)], 12, masters=False).total
    model = sum(parameter.numel() * 4 for parameter in tiny_llama().parameters())
    editor = planned(tmp_path, llama_folder, stream_file, monkeypatch, [model + 1e3, needs + 1e3, 1e9])
    assert list(editor.state_devices.values()) == [GPU[1], HOST]
    (elsewhere, in_host) = [record.getMessage() for record in caplog.records if "oom for the" in record.getMessage()]
    assert "No room for the editor's state of model.layers.0.mlp.down_proj" in elsewhere and "cuda:1" in elsewhere
    assert f"No accelerator has room for the editor's state of {LLAMA_SITE}" in in_host
    assert f"{size(4 * 12 * (32 + 16))} of keys and value gradients go to the host" in in_host
    assert f"{size(12 * (4 * 32 + 8 * 16))} of update factors come back" in in_host


def test_a_placement_without_room_is_refused_before_anything_is_loaded(
    tmp_path: Path, llama_folder: str, stream_file: str, no_loading: None
) -> None:
    """A thousand million answer tokens a turn, or a stream that says 12; really asked of this machine."""
    for settings, said in (
        ({"turn_rows": 10**9}, r"1000000000 answer tokens a turn.*docs/memory\.md"),
        (
            {"turn_rows": 10**9, "editor_device": "cpu", "device_map": "auto"},
            "no room for the editor's state",
        ),
    ):
        with pytest.raises(PlacementError, match=said) as refused:
            fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[DevicePlacement(**settings)])
        assert "  cpu " in str(refused.value) and "missing" in str(refused.value)
    for settings, said in (({"turn_rows": 0}, "turn_rows must be at least 1"), ({"headroom": 1.0}, "headroom must be")):
        with pytest.raises(SettingError, match=said):
            DevicePlacement(**settings)


def test_another_ranks_device_is_refused(
    tmp_path: Path, llama_folder: str, stream_file: str, no_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_placement, "accelerators", lambda: GPU)
    monkeypatch.setattr(device_placement, "foreign_devices", lambda trainer, named: ["cuda:1"])
    placement = DevicePlacement(device_map={"": "cuda:0", "lm_head": "cuda:1"})
    with pytest.raises(MisconfigurationException, match=r"names cuda:1, which process 0 of 1 does not have to itself"):
        fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[placement])


def test_devices_that_do_not_exist_are_refused_before_anything_is_loaded(
    tmp_path: Path, llama_folder: str, stream_file: str, no_loading: None
) -> None:
    for settings, named in (
        ({"editor_device": ["cpu", "cuda:7"]}, "editor_device=cuda:7"),
        ({"editor_device": "cuda:7"}, "editor_device=cuda:7"),
        ({"device_map": {"model.layers.0": "cuda:9", "": "cpu"}}, r"device_map\['model.layers.0'\]=cuda:9"),
        ({"device_map": "evenly"}, "device_map=evenly"),
    ):
        with pytest.raises(MisconfigurationException, match=f"{named}: no such device here; there is cpu"):
            fit(tmp_path / "run", llama_folder, {"path": stream_file}, callbacks=[DevicePlacement(**settings)])
    assert existing_device("here", "cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"editor_device": "cpu", "device_map": {"": "cpu"}},
        {"editor_device": "spread", "device_map": "auto"},
        {"editor_device": ["cpu"], "device_map": "sequential", "turn_rows": 20},
        {"device_map": "cpu"},
    ],
    ids=str,
)
def test_a_placed_model_and_editor_give_the_same_weights(
    tmp_path: Path, llama_bf16_folder: str, stream_file: str, settings: dict[str, Any]
) -> None:
    """Loaded through a device map, with the editor's device named, the weights are those of a plain run."""
    plain = fit(tmp_path / "plain", llama_bf16_folder, {"path": stream_file}, TWO_SITES)
    placed = fit(tmp_path / "placed", llama_bf16_folder, {"path": stream_file}, TWO_SITES,
                 callbacks=[DevicePlacement(**settings)])  # fmt: skip
    assert set(placed.device_map.values()) == {"cpu"}
    assert set(placed.state_devices.values()) == {HOST}
    assert {site.master_device for site in placed.sites} == {HOST}
    assert_same_state(plain.state_dict(), placed.state_dict())


def test_a_second_verb_with_a_loaded_model_is_planned_with_what_is_there(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    """The model's memory is not free, and need not be found again; nothing moves it."""
    editor = LifelongEditor(base_model=llama_folder, step_size=1e-3, ridge=1.0, **TWO_SITES)
    data = EditStream(path=stream_file, turn_size=8)
    for name, verb in (("a", "validate"), ("b", "fit"), ("c", "test")):
        trainer = EditTrainer(run_dir=str(tmp_path / name), accelerator="cpu", enable_progress_bar=False,
                              callbacks=[DevicePlacement(device_map="auto", editor_device="spread")])  # fmt: skip
        getattr(trainer, verb)(editor, datamodule=data)
    assert editor.state.committed_turns == 5 and editor.device_map == {"": "cpu"}
    loaded = LifelongEditor(base_model=llama_folder, sites=[LLAMA_SITE])
    loaded.configure_model()
    trainer = EditTrainer(run_dir=str(tmp_path / "d"), callbacks=[DevicePlacement(device_map="auto")])
    with pytest.raises(MisconfigurationException, match=r"device_map came too late"):
        trainer.fit(loaded, datamodule=EditStream(path=stream_file))
    editor.model.lm_head.to("meta")
    assert editor.cpu() is editor and editor.to("cpu") is editor
    assert editor.model.lm_head.weight.is_meta, "a placed model stays where its hooks send its inputs"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("model_on", "editor_on"), [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:0")])
def test_model_and_editor_on_a_gpu_and_the_host(
    tmp_path: Path, llama_bf16_folder: str, stream_file: str, model_on: str, editor_on: str
) -> None:
    """Whichever way round: the weights of a run on the CPU, to the rounding of a bfloat16 forward pass."""
    plain = fit(tmp_path / "plain", llama_bf16_folder, {"path": stream_file}, TWO_SITES)
    placed = fit(tmp_path / "placed", llama_bf16_folder, {"path": stream_file}, TWO_SITES,
                 callbacks=[DevicePlacement(editor_device=editor_on, device_map={"": model_on})])  # fmt: skip
    for site in placed.sites:
        assert str(site.weight.device) == model_on and site.master is not None
        assert str(site.master.device) == editor_on
        moments = placed.state.statistics.gradients[site.name]
        assert str(moments.mean.device) == editor_on
        assert relative_difference(updates(placed)[site.name], updates(plain)[site.name]) < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_and_its_editor_over_two_gpus(tmp_path: Path, llama_folder: str, stream_file: str) -> None:
    plain = fit(tmp_path / "plain", llama_folder, {"path": stream_file}, TWO_SITES)
    device_map = {"": "cuda:0", "model.layers.1": "cuda:1", "model.norm": "cuda:1", "lm_head": "cuda:1"}
    placed = fit(tmp_path / "placed", llama_folder, {"path": stream_file}, TWO_SITES,
                 callbacks=[DevicePlacement(editor_device=["cuda:1", "cuda:0"], device_map=device_map)])  # fmt: skip
    assert [str(site.weight.device) for site in placed.sites] == ["cuda:0", "cuda:1"]
    assert [str(device) for device in placed.state_devices.values()] == ["cuda:1", "cuda:0"]
    for site in placed.sites:
        assert relative_difference(updates(placed)[site.name], updates(plain)[site.name]) < 1e-3


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
