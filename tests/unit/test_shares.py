"""How a turn is divided: every edit once, about equally many tokens, whole micro-batches where they must be."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stableedit_pl.devices import ranks
from stableedit_pl.devices.shares import Share, divide
from stableedit_pl.method.statistics import Rows
from stableedit_pl.model import shared_capture as shares_module
from stableedit_pl.model.capture import Captured
from stableedit_pl.model.encoding import IGNORED, Encoding
from stableedit_pl.model.micro_batches import by_length, in_order
from stableedit_pl.model.shared_capture import capture_together
from stableedit_pl.model.sites import Site
from stableedit_pl.trainer import _interleaved

LENGTHS = [3, 9, 4, 4, 12, 7, 5, 3, 9, 8, 6, 5, 30]


def edits_of(share: Share) -> list[list[int]]:
    return [[share.members[i] for i in piece] for piece in share.micro_batches]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 16, 40])
def test_every_edit_is_in_one_share(count: int, whole: bool) -> None:
    micro_batches = in_order(len(LENGTHS), 3) if whole else by_length(LENGTHS, 24)
    shares = divide(micro_batches, LENGTHS, count, whole)
    assert len(shares) == count
    given = [i for share in shares for piece in edits_of(share) for i in piece]
    assert sorted(given) == list(range(len(LENGTHS)))
    assert all(sorted(i for piece in edits_of(share) for i in piece) == list(share.members) for share in shares)
    pieces = {tuple(piece) for share in shares for piece in edits_of(share)}
    if whole:
        assert pieces == set(micro_batches)
    else:
        assert all(any(set(piece) <= set(whole_piece) for whole_piece in micro_batches) for piece in pieces)


def test_tokens_are_divided_evenly() -> None:
    lengths = [5 + i % 7 for i in range(200)]
    shares = divide(by_length(lengths, 256), lengths, 4, whole=False)
    tokens = [sum(lengths[i] for i in share.members) for share in shares]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a second device."""

    device = property(lambda self: torch.device("cuda", 1))  # type: ignore[assignment]


def test_rows_of_a_placed_model_meet_and_go_back_to_their_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, two sites on two devices: one collective where collectives are, and the turn's order at each site."""
    sites = [Site("a", nn.Linear(3, 2)), Site("b", nn.Linear(3, 2))]
    encodings = [Encoding((1, 2), (IGNORED, 5), 1) for _ in range(4)]
    turn = {name: Rows(torch.rand(4, 3), torch.rand(4, 2)) for name in "ab"}
    shares = divide(((0, 2), (1, 3)), [2] * 4, 2, whole=True)
    moves: list[str] = []

    def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moves.append(f"{tensor.device} > {device}")
        return tensor.as_subclass(Elsewhere if device.type == "cuda" else torch.Tensor)

    def captured(rank: int) -> Captured:
        own = list(shares[rank].members)
        rows = {name: Rows(turn[name].keys[own], turn[name].gradients[own]) for name in "ab"}
        rows["b"] = Rows(rows["b"].keys.as_subclass(Elsewhere), rows["b"].gradients.as_subclass(Elsewhere))
        squares = {name: torch.tensor([[10.0 * i] for i in own]) for name in "ab"}
        squares["b"] = squares["b"].as_subclass(Elsewhere)
        margins = torch.tensor([[i / 10] for i in own])
        return Captured(rows, torch.tensor([own, own], dtype=torch.float32), squares=squares, margins=margins)

    def gather_rows(own: torch.Tensor, counts: list[int]) -> torch.Tensor:
        assert own.device == torch.device("cpu") and counts == [2, 2]
        if own.shape[1] == 2:  # what was measured
            return torch.cat([captured(rank).measured.T for rank in range(2)])
        every = [captured(rank) for rank in range(2)]
        parts = [torch.cat([x.as_subclass(torch.Tensor) for name in "ab" for x in
                 (c.rows[name].keys, c.rows[name].gradients, c.squares[name])] + [c.margins], dim=1)
                 for c in every if c.margins is not None]  # fmt: skip
        assert torch.equal(own, parts[1])
        return torch.cat(parts)

    for name, fake in {"world": lambda: 2, "rank": lambda: 1, "device": lambda: torch.device("cpu")}.items():
        monkeypatch.setattr(ranks, name, fake)
    monkeypatch.setattr(ranks, "gather_rows", gather_rows)
    monkeypatch.setattr(shares_module, "moved", moved)
    monkeypatch.setattr(shares_module, "capture", lambda *_: captured(1))
    whole: Any = SimpleNamespace(model=nn.Identity())
    found, _ = capture_together(whole, sites, encodings, ((0, 2), (1, 3)), 0, "micro_batch_mean")
    for name, device in (("a", "cpu"), ("b", "cuda:1")):
        assert str(found.rows[name].keys.device) == str(found.rows[name].gradients.device) == device
        assert torch.equal(found.rows[name].keys.as_subclass(torch.Tensor), turn[name].keys)
        assert torch.equal(found.rows[name].gradients.as_subclass(torch.Tensor), turn[name].gradients)
        assert str(found.squares[name].device) == device
        assert found.squares[name].as_subclass(torch.Tensor)[:, 0].tolist() == [0.0, 10.0, 20.0, 30.0]
    assert found.margins is not None and found.margins[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    there = ["cpu > cpu"] * 3 + ["cuda:1 > cpu"] * 3 + ["cpu > cpu"]
    assert moves[:7] == there and sorted(moves[7:]) == ["cpu > cpu"] * 4 + ["cpu > cuda:1"] * 3
    assert found.measured[0].tolist() == [0, 1, 2, 3]


def test_pieces_divided_by_rank_come_back_in_order() -> None:
    pieces = [[0, 1, 2, 3, 4], [5], [6, 7]]
    assert _interleaved([[piece[rank::3] for piece in pieces] for rank in range(3)]) == pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_every_single_change_shows_in_a_fingerprint(dtype: torch.dtype) -> None:
    tensor = nn.functional.one_hot(torch.arange(5), 6).to(dtype)
    before = ranks.fingerprint(tensor)
    assert ranks.fingerprint(tensor.clone()) == before
    for row in range(5):
        for column in range(6):
            changed = tensor.clone()
            changed[row, column] += 1
            assert ranks.fingerprint(changed) != before
    assert ranks.fingerprint(tensor.flip(1)) != before and ranks.fingerprint(tensor.flip(0)) != before
    assert ranks.fingerprint(torch.tensor(3, dtype=dtype)) != ranks.fingerprint(torch.tensor(4, dtype=dtype))


def test_one_process_needs_nobody() -> None:
    rows = torch.rand(3, 2)
    assert ranks.gather_rows(rows, [3]) is rows and ranks.gather("x") == ["x"] and ranks.broadcast(7) == 7
    assert ranks.largest(2) == 2 and ranks.own_part([1, 2, 3]) == [1, 2, 3]
    ranks.refuse_disagreement({"a": 1}, 3)
