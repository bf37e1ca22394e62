"""How a turn is divided: every edit once, about equally many tokens, whole micro-batches where they must be."""

import pytest
import torch
from torch import nn

from stableedit_pl import ranks
from stableedit_pl.micro_batches import by_length, in_order
from stableedit_pl.shares import Share, divide
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
