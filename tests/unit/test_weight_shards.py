"""Parts of a weight: which, put together, summed."""

import pytest
import torch
from gloo_ranks import in_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from stableedit_pl.devices import ranks
from stableedit_pl.devices.weight_shards import WeightShard, local
from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.workspace import Workspace, workspace_sizes
from stableedit_pl.model.sites import Site


def test_a_plain_weight_is_its_own_shard() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    shard = WeightShard.of(weight)
    assert shard == WeightShard((3, 4), (0, 3), (0, 4), sharded=False)
    assert str(shard) == "[0:3, 0:4]"
    assert shard.gathered(weight) is weight
    verdict, sums = torch.tensor(True), torch.tensor([1.0, 2.0])
    assert shard.everywhere(verdict) is verdict and shard.total(sums) is sums


def placements(mesh: DeviceMesh) -> None:
    """Uneven, empty, on both dimensions, replicated in part: the rectangles cover the weight, each number once."""
    rank = ranks.rank()
    for height, width, how, kinds in (
        (7, 6, (Shard(0), Shard(1)), 4),
        (7, 6, (Shard(0), Replicate()), 2),
        (7, 6, (Replicate(), Shard(1)), 2),
        (1, 6, (Shard(0), Replicate()), 1),  # ranks 2 and 3 hold nothing
    ):
        whole = torch.arange(float(height * width)).reshape(height, width)
        weight = distribute_tensor(whole, mesh, how)
        shard, own = WeightShard.of(weight), local(weight)
        assert shard.sharded and shard.shape == (height, width)
        assert torch.equal(shard.cut(whole), own)
        gathered = shard.gathered(own)
        assert (gathered is None) == (rank > 0)
        assert gathered is None or torch.equal(gathered, whole)
        sums = shard.total(torch.stack([own.double().sum(), own.double().square().sum()]))
        assert sums.tolist() == [whole.sum().item(), whole.double().square().sum().item()], how
        assert len(shard._holders) == kinds
        assert not shard.everywhere(torch.tensor(rank != 3))
        assert shard.everywhere(torch.tensor(True))
    assert not WeightShard.of(distribute_tensor(torch.ones(2, 2), mesh, (Replicate(), Replicate()))).sharded


def test_shards_on_a_mesh_of_two_dimensions() -> None:
    in_ranks(2, 2, placements)


def strided(mesh: DeviceMesh) -> None:
    """A layer divided by outputs, then by FSDP2 over the same dimension: rows of a rank lie together, 25 in 13 and 12.

    An update added shard by shard is the update added to the whole.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50, bias=False))
    whole = model[0].weight.detach().clone()
    parallelize_module(model, mesh["tensor_parallel"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data_parallel"])
    site = Site("0", model[0])
    assert isinstance(model[0].weight, DTensor)
    tensor, data = mesh["tensor_parallel"].get_local_rank(), mesh["data_parallel"].get_local_rank()
    start = 25 * tensor + 13 * data
    assert site.shard.rows == (start, start + (12 if data else 13))
    assert (site.d_in, site.d_out) == (6, 50)
    update = SiteUpdate(torch.randn(4, 6), torch.randn(4, 50).double())
    site.add(site.placed(update), Workspace(site.state.device, *workspace_sizes(site.state.shape, 4)))
    expected = (whole.double() + (update.left.double().T @ update.right).T).float()
    gathered = site.shard.gathered(site.state)
    assert gathered is None or torch.equal(gathered, expected)
    with site.original_weight():
        assert torch.equal(site.weight, site.shard.cut(whole))
    assert torch.equal(site.weight, site.shard.cut(expected))
    site.load(whole)
    assert torch.equal(site.state, site.shard.cut(whole))
    with pytest.raises(ValueError, match=r"an update of 0 is \[6, 50\]"):
        site.placed(SiteUpdate(torch.ones(1, 6), torch.ones(1, 13).double()))


def test_an_update_meets_each_shard() -> None:
    in_ranks(2, 2, strided)


def rows_of_teams(mesh: DeviceMesh) -> None:
    """Ranks 0 and 1 have one part of the work, 2 and 3 the other; the first of each speaks for both."""
    part = ranks.part()
    assert ranks.parts() == 2 and part == ranks.rank() // 2
    assert ranks.own_part([10, 11, 12]) == ([10, 12], [11])[part]
    own = torch.full((part + 1, 2), float(ranks.rank()))
    assert ranks.gather_rows(own, [1, 2])[:, 0].tolist() == [0.0, 2.0, 2.0]
    assert ranks.gather_parts(ranks.rank()) == [0, 2]
    assert [t.tolist() for t in ranks.gather_same(torch.tensor([ranks.rank()]))] == [[0], [2]]
    mine = torch.arange(5.0).reshape(1, 5).chunk(2, dim=1)[ranks.rank() % 2] + 10 * part
    assert ranks.gather_columns(mine, 5).tolist() == [[x + 10 * part for x in (0.0, 1.0, 2.0, 3.0, 4.0)]]
    with pytest.raises(
        ranks.RanksError, match=r"same bytes as rank 0: w on rank 1; v on rank 3 \(held against rank 2\)"
    ):
        ranks.refuse_disagreement({"w": ranks.rank()} if part == 0 else {"v": ranks.rank()}, 5)
    ranks.refuse_disagreement({"w": part} if part == 0 else {"v": part}, 5)


def test_teams_speak_with_one_voice() -> None:
    in_ranks(2, 2, rows_of_teams)
