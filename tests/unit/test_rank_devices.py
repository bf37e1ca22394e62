"""Whose devices are whose, on machines that are made up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stableedit_pl.devices import rank_devices as module
from stableedit_pl.devices import ranks
from stableedit_pl.devices.rank_devices import (
    as_device,
    foreign_devices,
    free_bytes,
    host_memory,
    own_devices,
    rank_devices,
)

CPU, MPS = torch.device("cpu"), torch.device("mps")
EIGHT = [torch.device("cuda", index) for index in range(8)]


def own(starts: list[int], existing: int = 8, width: int | None = None) -> list[list[int]]:
    devices = [EIGHT[start] for start in starts]
    found = [own_devices(devices, place, EIGHT[:existing], width) for place in range(len(starts))]
    return [[device.index for device in one] for one in found]


def test_a_rank_has_the_devices_up_to_the_next_ranks() -> None:
    assert own([0, 4]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert own([4, 0]) == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert own([0, 2, 4, 6]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert own([0]) == [[0, 1, 2, 3, 4, 5, 6, 7]] and own([6]) == [[6, 7]]


def test_all_ranks_have_as_many_as_the_narrowest() -> None:
    """Replicas that were placed differently would not round alike."""
    assert own([0, 1]) == [[0], [1]]
    assert own([0, 3, 5]) == [[0, 1], [3, 4], [5, 6]]
    assert own([0, 4], width=2) == [[0, 1], [4, 5]]


def test_other_kinds_of_devices() -> None:
    assert own_devices([CPU, CPU], 1, EIGHT) == []
    assert own_devices([torch.device("mps", 0)], 0, [MPS]) == [MPS]
    assert [str(as_device(name)) for name in (2, "cuda", "cuda:1", "cpu:0", "mps:0")] == [
        "cuda:2", "cuda:0", "cuda:1", "cpu", "mps"]  # fmt: skip
    with pytest.raises(RuntimeError):
        as_device("evenly")


def second_of_two(starts: list[torch.device]) -> Any:
    strategy = SimpleNamespace(parallel_devices=starts, root_device=starts[1])
    return SimpleNamespace(strategy=strategy, local_rank=1, world_size=2)


def test_devices_of_other_ranks_are_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "accelerators", lambda: EIGHT)
    trainer = second_of_two([EIGHT[0], EIGHT[4]])
    assert rank_devices(trainer) == EIGHT[4:]
    assert foreign_devices(trainer, ["cuda:3", 5, "cpu", torch.device("cuda:0")]) == ["cuda:0", "cuda:3"]
    assert foreign_devices(second_of_two([CPU, CPU]), ["cuda:3", "cpu"]) == ["cuda:3"]
    alone = SimpleNamespace(strategy=SimpleNamespace(root_device=EIGHT[6]), local_rank=0, world_size=1)
    assert rank_devices(alone) == EIGHT[6:] and foreign_devices(alone, ["cuda:0"]) == []


def test_a_narrower_machine_elsewhere_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines, one with three devices for its last rank."""
    monkeypatch.setattr(module, "accelerators", lambda: EIGHT)
    monkeypatch.setattr(ranks, "gather", lambda own: [own, 3])
    assert rank_devices(second_of_two([EIGHT[0], EIGHT[4]])) == EIGHT[4:7]


def test_free_memory_is_the_least_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks must plan alike, or they would not hold the same bytes."""
    free = {EIGHT[4]: 40.0, EIGHT[5]: 60.0}
    monkeypatch.setattr(module, "_free", free.__getitem__)
    monkeypatch.setattr(module, "host_memory", lambda: 100.0)
    assert free_bytes([EIGHT[4], EIGHT[5], CPU], sharing=2) == [40.0, 60.0, 50.0]
    monkeypatch.setattr(ranks, "gather", lambda own: [own, [70.0, 30.0, 50.0]])
    assert free_bytes([EIGHT[4], EIGHT[5], CPU], sharing=2) == [40.0, 30.0, 50.0]


def test_the_host_says_what_it_has() -> None:
    assert host_memory() > 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_it_has() -> None:
    device = torch.device("cuda", 0)
    (before,) = free_bytes([device], 1)
    total = torch.cuda.get_device_properties(device).total_memory
    assert 0 < before <= total
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_bytes([device], 1)[0] <= before - held.numel() / 2
