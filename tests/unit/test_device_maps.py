"""A model and its editor over invented devices: an 8B Llama without weights, split by accelerate itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny import LLAMA_SITE, edit_rows, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from stableedit_pl.callbacks.device_placement import _report
from stableedit_pl.devices.device_maps import Demand, Plan, inferred, key_of, model_bytes, plan_automatic, plan_explicit
from stableedit_pl.devices.memory import planned_bytes
from stableedit_pl.devices.placement import HOST, Needs, PlacementError, Wanted
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.model.capture import Captured, capture
from stableedit_pl.model.encoding import Encoder
from stableedit_pl.model.loading import LoadingError, load_skeleton
from stableedit_pl.model.micro_batches import in_order
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import SiteError, resolve_sites

GIB = 2**30
GPU = [torch.device("cuda", index) for index in range(4)]
NEEDS = Needs(300, masters=True, scope="site", settings=MethodSettings())
SEVEN = planned_bytes([(14336, 4096)] * 7, 300).total


@pytest.fixture(scope="module")
def llama() -> Any:
    """The shapes of Llama 3 8B in bfloat16, 14.96 GiB of them, on ``meta``."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def demand(model: Any, wanted: Wanted = "site", over: int = 2, layers: str = "{25..31}") -> Demand:
    return Demand(model, resolve_sites(model, [f"model.layers.{layers}.mlp.down_proj"]), NEEDS, wanted, GPU[:over])


def memory(*gibibytes: float, host: float = 64) -> dict[torch.device, float]:
    return {**{GPU[i]: count * GIB for i, count in enumerate(gibibytes)}, HOST: host * GIB}


def assert_all_have_room(plan: Plan) -> None:
    assert plan.placement is not None
    for device, room in plan.rooms.items():
        assert room.model + plan.placement.planned.get(device, 0) + room.kept <= room.free, device
    assert sum(room.model for room in plan.rooms.values()) == pytest.approx(14.96 * GIB, rel=1e-3)


def test_sequential_leaves_the_editor_room_where_the_sites_are(llama: Any) -> None:
    """The model alone would go to the first device, and its last layers with it: 15 + 3.2 GiB of 18."""
    alone = inferred(llama, "sequential", {device: 0.9 * count for device, count in memory(20, 20).items()})
    assert set(alone.values()) == {GPU[0]}
    plan = plan_automatic(demand(llama), "sequential", memory(20, 20), 0.1)
    assert_all_have_room(plan)
    assert plan.placement is not None and not plan.placement.moved
    assert set(plan.placement.device_of.values()) <= set(GPU[:2]) and plan.rooms[GPU[1]].model > 0
    assert plan.rooms[GPU[0]].free - plan.rooms[GPU[0]].kept - plan.rooms[GPU[0]].model >= SEVEN


@pytest.mark.parametrize("kind", ["auto", "balanced"])
def test_balanced_maps_divide_the_model(llama: Any, kind: str) -> None:
    plan = plan_automatic(demand(llama, "spread", over=4), kind, memory(12, 12, 12, 12), 0.1)
    assert_all_have_room(plan)
    assert all(2 * GIB < plan.rooms[device].model < 6 * GIB for device in GPU)
    assert plan.placement is not None
    assert [device.index for device in plan.placement.device_of.values()] == [0, 1, 2, 3, 0, 1, 2]


def test_a_named_device_is_left_room_before_the_model_comes(llama: Any) -> None:
    plan = plan_automatic(demand(llama, GPU[0]), "sequential", memory(18, 12), 0.0)
    assert_all_have_room(plan)
    assert plan.placement is not None and plan.placement.planned == {GPU[0]: SEVEN}
    with pytest.raises(PlacementError, match="no room for the editor's state") as refused:
        plan_automatic(demand(llama, GPU[1]), "sequential", memory(16, 3), 0.0)
    assert "cuda:1" in str(refused.value) and "3.24 GiB" in str(refused.value)


@pytest.mark.parametrize("layers", ["{0..6}", "{25..31}"])
def test_the_editor_goes_to_the_host_before_the_model_does(llama: Any, layers: str) -> None:
    """17.6 GiB for a model of 15: what is left does not hold the state of all seven sites, 3.2 GiB and more apart."""
    plan = plan_automatic(demand(llama, layers=layers), "auto", memory(9.8, 9.8), 0.1)
    assert_all_have_room(plan)
    assert plan.offloaded == 0 and plan.rooms[HOST].model == 0
    assert plan.placement is not None and plan.placement.in_host
    assert plan.placement.planned[HOST] > 0


def test_what_the_page_quotes_is_what_is_printed(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """docs/placement.md: a warning and a refusal, for two sizes of two GPUs."""
    page = " ".join((Path(__file__).parents[2] / "docs/placement.md").read_text().split())
    _report(plan_automatic(demand(llama), "auto", memory(9.8, 9.8, host=56), 0.1), NEEDS)
    warnings = [record.getMessage() for record in caplog.records if "the editor's state" in record.getMessage()]
    assert len(warnings) == 2 and " ".join(warnings) in page
    with pytest.raises(PlacementError) as refused:
        plan_explicit(demand(llama, GPU[1]), {"": GPU[0]}, memory(23.5, 3, host=56), 0.1)
    assert " ".join(str(refused.value).split()) in page


def test_a_model_without_room_is_refused(llama: Any) -> None:
    with pytest.raises(PlacementError, match=r"leaves model\.layers\.\S+down_proj.* in host memory while other parts"):
        plan_automatic(demand(llama), "auto", memory(10), 0.1)
    with pytest.raises(PlacementError, match="no room where it is to go") as refused:
        plan_automatic(demand(llama), "auto", memory(10, host=2), 0.1)
    assert "It takes 14.96 GiB" in str(refused.value)
    with pytest.raises(PlacementError, match="no room where it is to go") as refused:
        plan_explicit(demand(llama), {"": GPU[0]}, memory(15), 0.1)
    assert "cuda:0  15.00 GiB  14.96 GiB   1.50 GiB  0.00 MiB  1.46 GiB" in str(refused.value)


def test_an_explicit_map_is_taken_as_it_is(llama: Any) -> None:
    device_map = {"": GPU[0], "model.layers.30": GPU[1], "model.layers.31.mlp": GPU[2], "model.layers.0": HOST}
    plan = plan_explicit(demand(llama, over=3), device_map, memory(24, 12, 12), 0.1)
    layer = sum(p.numel() * 2 for p in llama.model.layers[0].parameters())
    mlp = 3 * 14336 * 4096 * 2
    assert (plan.rooms[GPU[1]].model, plan.rooms[GPU[2]].model, plan.offloaded) == (layer, mlp, layer)
    assert plan.placement is not None
    assert [device.index for device in plan.placement.device_of.values()] == [0, 0, 0, 0, 0, 1, 2]


def test_a_gap_in_a_map_is_named(llama: Any) -> None:
    with pytest.raises(PlacementError, match=r"says nothing of model\.embed_tokens\.weight"):
        plan_explicit(demand(llama), {"model.layers": GPU[0], "lm_head": GPU[0]}, memory(80), 0.1)


def test_without_accelerators_all_is_on_the_host(llama: Any) -> None:
    plan = plan_automatic(demand(llama, "spread", over=0), "auto", memory(host=64), 0.1)
    assert plan.device_map == {"": HOST} and plan.offloaded == 0
    assert plan.placement is not None and plan.placement.planned == {HOST: SEVEN}


def test_replicas_of_two_ranks_are_placed_alike(llama: Any) -> None:
    """Ranks at cuda:0 and cuda:2: the same plan, two devices on."""
    first = plan_automatic(demand(llama, "spread"), "auto", memory(12, 13), 0.1)
    free = {GPU[2]: 12.0 * GIB, GPU[3]: 13.0 * GIB, HOST: 64.0 * GIB}
    second = plan_automatic(Demand(llama, demand(llama).sites, NEEDS, "spread", GPU[2:]), "auto", free, 0.1)
    assert {name: device.index + 2 for name, device in first.device_map.items()} == {
        name: device.index for name, device in second.device_map.items()
    }
    assert first.placement is not None and second.placement is not None
    places = [device.index for device in first.placement.device_of.values()]
    assert [device.index - 2 for device in second.placement.device_of.values()] == places == [0, 1, 0, 1, 0, 1, 0]


def test_the_first_device_is_spared_where_it_is_ones_own(llama: Any) -> None:
    plan = plan_automatic(demand(llama), "balanced_low_0", memory(12, 12, 12), 0.1)
    assert plan.rooms[GPU[0]].model < plan.rooms[GPU[1]].model / 2
    with pytest.raises(PlacementError, match="balanced_low_0 spares cuda:0"):
        inferred(llama, "balanced_low_0", {GPU[2]: 20 * GIB, GPU[3]: 20 * GIB})


def test_devices_have_accelerates_names() -> None:
    assert [key_of(device) for device in (GPU[3], HOST, torch.device("mps"))] == [3, "cpu", "mps"]


def test_a_skeleton_has_names_shapes_and_dtype_but_no_bytes(llama_folder: str, llama_bf16_folder: str) -> None:
    real, skeleton = tiny_llama(), load_skeleton(llama_folder)
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert all(tensor.is_meta for tensor in [*skeleton.parameters(), *skeleton.buffers()])
    (site,) = resolve_sites(skeleton, [LLAMA_SITE])
    assert (site.d_in, site.d_out) == (32, 16) and site.original.is_meta
    assert load_skeleton(llama_bf16_folder).dtype == torch.bfloat16
    assert load_skeleton(llama_folder, "float16").dtype == torch.float16
    bytes_there = model_bytes(real, {"": HOST})
    assert bytes_there == model_bytes(skeleton, {"": HOST})
    with pytest.raises(SiteError, match=r"Near matches: model\.layers\.\d\.mlp\.down_proj"):
        resolve_sites(skeleton, ["model.layers.9.mlp.down_proj"])
    with pytest.raises(LoadingError, match=r"no config\.json"):
        load_skeleton("./nowhere")


def test_tied_weights_count_once() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        tied: Any = AutoModelForCausalLM.from_config(config)
    tied.tie_weights()
    total = sum(t.numel() * t.element_size() for t in [*tied.parameters(), *tied.buffers()])
    assert model_bytes(tied, {"": HOST, "lm_head": GPU[0]}) == {HOST: total}


def captured(model: Any) -> Captured:
    encoder = Encoder(word_tokenizer(), 32)
    encodings = [encoder.encode(row["prompt"], row["target"]) for row in edit_rows(6)]
    sites = resolve_sites(model, [LLAMA_SITE])
    return capture(PartialForward.tried(model, sites), sites, encodings, in_order(6, 3), 0)


@pytest.mark.parametrize("offloaded", ["model.layers.0", "model.embed_tokens"])
def test_capture_goes_through_accelerates_hooks(offloaded: str) -> None:
    """A dispatched model, part of it offloaded: weights there only while they run."""
    expected = captured(tiny_llama())
    model = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    cpu_offload(model.get_submodule(offloaded), torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    found = captured(model)
    assert torch.equal(found.rows[LLAMA_SITE].keys, expected.rows[LLAMA_SITE].keys)
    assert torch.equal(found.rows[LLAMA_SITE].gradients, expected.rows[LLAMA_SITE].gradients)
    assert found.losses == expected.losses
