"""Where model and state go, through whole runs: planned and refused before loading, and the same weights after all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import assert_same_state, fit, updates
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import LLAMA_SITE, relative_difference, tiny_llama

from stableedit_pl.callbacks import DevicePlacement, EditEvaluation, device_placement
from stableedit_pl.callbacks.device_placement import existing_device
from stableedit_pl.data.stream import EditStream
from stableedit_pl.devices.memory import planned_bytes
from stableedit_pl.devices.placement import HOST, PlacementError, size
from stableedit_pl.devices.rank_devices import as_device
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.model import editable_model
from stableedit_pl.trainer import EditTrainer

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
    passes = 10  # the editor's default
    needs = planned_bytes([(32, 16)], 12, masters=False, passes=passes).total
    model = sum(parameter.numel() * 4 for parameter in tiny_llama().parameters())
    editor = planned(tmp_path, llama_folder, stream_file, monkeypatch, [model + 1e3, needs + 1e3, 1e9])
    assert list(editor.state_devices.values()) == [GPU[1], HOST]
    (elsewhere, in_host) = [record.getMessage() for record in caplog.records if "oom for the" in record.getMessage()]
    assert "No room for the editor's state of model.layers.0.mlp.down_proj" in elsewhere and "cuda:1" in elsewhere
    assert f"No accelerator has room for the editor's state of {LLAMA_SITE}" in in_host
    assert f"{size(passes * 4 * 12 * (32 + 16))} of keys and value gradients go to the host" in in_host
    assert f"{size(passes * 12 * (4 * 32 + 8 * 16))} of update factors come back" in in_host


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
    assert editor.to("cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16
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
