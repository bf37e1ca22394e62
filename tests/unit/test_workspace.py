"""Sums of weights and factored updates by blocks, against the whole sum."""

from typing import Any

import pytest
import torch

from stableedit_pl.method import workspace
from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.workspace import Workspace, block_rows, workspace_sizes


def update_of(rank: int, d_in: int, d_out: int) -> SiteUpdate:
    generator = torch.Generator().manual_seed(0)
    return SiteUpdate(
        torch.randn(rank, d_in, generator=generator),
        torch.randn(rank, d_out, generator=generator, dtype=torch.float64) * 1e-3,
    )


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("block", [1, 100, 8 * 5 * 3, 2**26])
@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 7, 5), (3, 7, 5), (9, 7, 5), (2, 1, 6)])
def test_blocks_cover_the_weight_once_and_add_up(
    transposed: bool, block: int, rank: int, d_in: int, d_out: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(workspace, "BLOCK_BYTES", block)
    update = update_of(rank, d_in, d_out)
    dense = update.left.T.double() @ update.right
    weight = torch.randn((d_in, d_out) if transposed else (d_out, d_in))
    kept, got = weight.clone(), torch.full(weight.shape, float("nan"), dtype=torch.float64)
    scratch = Workspace(torch.device("cpu"), *workspace_sizes(weight.shape, rank))
    pieces = 0
    for rows, total in scratch.sums(weight, update, transposed):
        assert torch.isnan(got[rows]).all() and total.dtype == torch.float64
        got[rows] = total
        pieces += 1
    assert torch.allclose(got, weight.double() + (dense if transposed else dense.T), rtol=0, atol=1e-14)
    assert torch.equal(weight, kept)
    assert pieces == -(-len(weight) // block_rows(*weight.shape))


def test_a_block_is_rounded_to_whole_rows_and_never_none() -> None:
    assert block_rows(4096, 14336) == 2**26 // (8 * 14336) == 585
    assert block_rows(10, 14336) == 10 and block_rows(4, 2**40) == 1
    assert workspace_sizes((4096, 14336), 300) == (585 * (14336 + 300), 300 * 14336)


def test_a_workspace_serves_smaller_sites_than_it_was_made_for() -> None:
    scratch = Workspace(torch.device("cpu"), 1000, 1000)
    for d_in, d_out in ((7, 5), (3, 9), (1, 1)):
        update, weight = update_of(2, d_in, d_out), torch.zeros(d_out, d_in)
        ((_, total),) = scratch.sums(weight, update, False)
        assert torch.allclose(total, (update.left.T.double() @ update.right).T, atol=1e-15)


def test_nothing_of_the_update_is_rounded_before_the_sum() -> None:
    """Two parts of an update, each far below the weight's last digit, that together are not."""
    eps = torch.finfo(torch.float32).eps
    update = SiteUpdate(torch.ones(2, 1), torch.full((2, 1), 0.3 * eps, dtype=torch.float64))
    weight = torch.ones(1, 1)
    ((_, total),) = Workspace(torch.device("cpu"), 10, 10).sums(weight, update, False)
    assert total.float().item() == 1 + eps and (weight + 0.3 * eps).item() == 1.0
