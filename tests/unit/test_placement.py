"""Where state goes, on invented devices: beside sites, spread, on one, elsewhere for want of room, or nowhere."""

import pytest
import torch

from stableedit_pl.devices.memory import planned_bytes
from stableedit_pl.devices.placement import (
    HOST,
    ModelSite,
    Needs,
    PlacementError,
    Room,
    cost_in_host,
    place_state,
    size,
    table,
)
from stableedit_pl.method.settings import MethodSettings

GIB = 2**30
D_IN, D_OUT, ROWS = 14336, 4096, 300
GPU = [torch.device("cuda", index) for index in range(4)]
NEEDS = Needs(ROWS, masters=True, scope="site", settings=MethodSettings())


def sites(*devices: torch.device, itemsize: int = 2, d_in: int = D_IN) -> list[ModelSite]:
    return [ModelSite(f"layers.{i}.down_proj", d_in, D_OUT, itemsize, device) for i, device in enumerate(devices)]


def rooms(**gibibytes: float) -> dict[torch.device, Room]:
    """As in ``cuda0=80, cpu=64``: nothing taken."""
    names = {name: name if name == "cpu" else f"cuda:{name.removeprefix('cuda')}" for name in gibibytes}
    return {torch.device(names[name]): Room(count * GIB) for name, count in gibibytes.items()}


def state(count: int) -> int:
    return planned_bytes([(D_IN, D_OUT)] * count, ROWS).total


def test_state_stays_beside_its_site_where_there_is_room() -> None:
    found = place_state(sites(GPU[0], GPU[0], GPU[1]), NEEDS, rooms(cuda0=8, cuda1=8, cpu=64), "site", GPU[:2])
    assert list(found.device_of.values()) == [GPU[0], GPU[0], GPU[1]]
    assert found.planned == {GPU[0]: state(2), GPU[1]: state(1)} == found.wanted
    assert not found.moved and not found.in_host


def test_spread_takes_the_devices_in_turn_wherever_the_model_is() -> None:
    found = place_state(sites(*[GPU[0]] * 7), NEEDS, rooms(cuda0=8, cuda1=8, cuda2=8, cpu=64), "spread", GPU[:3])
    assert [device.index for device in found.device_of.values()] == [0, 1, 2, 0, 1, 2, 0]
    assert found.planned == {GPU[0]: state(3), GPU[1]: state(2), GPU[2]: state(2)}
    # The largest step's scratch is taken once on each device, not once for each site.
    assert state(3) < 3 * state(1)


def test_spread_over_nothing_is_the_host() -> None:
    found = place_state(sites(HOST, HOST), NEEDS, rooms(cpu=64), "spread", ())
    assert set(found.device_of.values()) == {HOST} and not found.in_host


def test_sites_that_share_moments_stay_together() -> None:
    needs = Needs(ROWS, masters=True, scope="shape", settings=MethodSettings())
    square = [ModelSite(name, D_OUT, D_OUT, 2, GPU[1]) for name in ("q", "o")]
    found = place_state([*sites(*[GPU[0]] * 3), *square], needs, rooms(cuda0=9, cuda1=9, cpu=64), "spread", GPU[:2])
    assert [device.index for device in found.device_of.values()] == [0, 0, 0, 1, 1]
    assert found.planned[GPU[0]] == planned_bytes([(D_IN, D_OUT)] * 3, ROWS, scope="shape").total


def test_what_finds_no_room_goes_to_the_emptiest_device_then_to_the_host() -> None:
    """Room beside the sites for two of five, on the third device for two more."""
    space = {GPU[0]: Room(state(2)), GPU[1]: Room(state(1) - 1), GPU[2]: Room(state(2)), HOST: Room(64 * GIB)}
    found = place_state(sites(*[GPU[0]] * 5), NEEDS, space, "site", GPU[:3])
    assert list(found.device_of.values()) == [GPU[0], GPU[0], GPU[2], GPU[2], HOST]
    assert [site.name for site in found.moved] == [f"layers.{i}.down_proj" for i in (2, 3, 4)]
    assert [site.name for site in found.in_host] == ["layers.4.down_proj"]
    assert found.wanted == {GPU[0]: state(5)}, "what a device map should have left"


def test_the_cost_of_host_memory_is_counted() -> None:
    """Figures by hand: keys and gradients in float32, weights in bfloat16, ten nodes or so of a 4096-wide root."""
    text = cost_in_host(sites(GPU[0], GPU[0]), NEEDS)
    assert size(2 * 4 * ROWS * (D_IN + D_OUT)) == "42.19 MiB" and "42.19 MiB of keys and value gradients" in text
    assert size(2 * 2 * D_IN * D_OUT) == "0.22 GiB" and "0.22 GiB of weights come back over the bus" in text
    _, _, flop = NEEDS.traffic(sites(GPU[0])[0], HOST)
    node = D_OUT**3 / 3 + 2 * ROWS * D_OUT**2
    assert 5 * node < flop < 20 * node and f"{2 * flop / 1e12:.2g} TFLOP" in text
    # A float32 model has no master: the update travels in factors.
    there, back, _ = NEEDS.traffic(sites(GPU[0], itemsize=4)[0], HOST)
    assert (there, back) == (4 * ROWS * (D_IN + D_OUT), ROWS * (4 * D_IN + 8 * D_OUT))
    assert "update factors come back" in cost_in_host(sites(GPU[0], itemsize=4), NEEDS)


def test_a_named_device_without_room_is_refused_with_figures() -> None:
    """Seven sites of an 8B model take 3.24 GiB: docs/memory.md."""
    seven = sites(*[GPU[0]] * 7)
    assert set(place_state(seven, NEEDS, {GPU[1]: Room(3.25 * GIB)}, GPU[1]).device_of.values()) == {GPU[1]}
    space = {GPU[0]: Room(80 * GIB, 15 * GIB, 8 * GIB), GPU[1]: Room(16 * GIB, 12 * GIB, GIB), HOST: Room(200 * GIB)}
    with pytest.raises(
        PlacementError, match=r"no room for the editor's state of 7 sites \(300 answer tokens"
    ) as refused:
        place_state(seven, NEEDS, space, GPU[1])
    assert str(refused.value).splitlines()[1:5] == [
        "  device        free      model  kept free    editor   missing",
        "  cuda:0   80.00 GiB  15.00 GiB   8.00 GiB  0.00 MiB         -",
        "  cuda:1   16.00 GiB  12.00 GiB   1.00 GiB  3.24 GiB  0.24 GiB",
        "  cpu     200.00 GiB   0.00 MiB   0.00 MiB  0.00 MiB         -",
    ]
    assert "Nothing was loaded" in str(refused.value) and "DevicePlacement.editor_device" in str(refused.value)


@pytest.mark.parametrize("wanted", ["site", "spread"])
def test_without_room_anywhere_not_even_the_host_helps(wanted: str) -> None:
    with pytest.raises(PlacementError, match="no room for the editor's state of 2 sites"):
        place_state(sites(GPU[0], GPU[1]), NEEDS, rooms(cuda0=0.1, cuda1=0.1, cpu=0.5), wanted, GPU[:2])


def test_needs_follow_the_method() -> None:
    """Whitening takes more than none; an improper prior needs eigh, which takes more than quadrature; so do masters."""
    site, host_solver = sites(GPU[0]), sites(HOST, d_in=D_OUT)
    none = Needs(ROWS, True, "site", MethodSettings(normalization="none"))
    paper = Needs(ROWS, True, "site", MethodSettings(prior_strength=0.0))
    assert none.bytes(site, GPU[0]) < NEEDS.bytes(site, GPU[0]) < paper.bytes(site, GPU[0])
    assert NEEDS.bytes(site, GPU[0]) == state(1)
    assert NEEDS.bytes(host_solver, HOST) == planned_bytes([(D_OUT, D_OUT)], ROWS, solver="quadrature").total
    without = Needs(ROWS, False, "site", MethodSettings()).bytes(site, GPU[0])
    assert state(1) - without == 4 * D_IN * D_OUT == state(1) - NEEDS.bytes(sites(GPU[0], itemsize=4), GPU[0])
    assert NEEDS.bytes([], GPU[0]) == 0


def test_unknown_memory_is_room_enough() -> None:
    mps = torch.device("mps")
    found = place_state(sites(mps), NEEDS, {mps: Room(float("inf")), HOST: Room(0)}, "site", [mps])
    assert set(found.device_of.values()) == {mps}
    assert "unknown" in table({mps: Room(float("inf"))}, {})
