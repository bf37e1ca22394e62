"""The statistics of all sites: who shares moments with whom, and what a file of them must hold."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stableedit_pl.method.statistics import LNStatistics, Rows


@dataclass
class Shape:
    name: str
    d_in: int
    d_out: int


SITES = [Shape("a", 3, 2), Shape("b", 3, 2), Shape("c", 2, 3)]


def rows(site: Shape, n: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(n, site.d_in, generator=generator), torch.randn(n, site.d_out, generator=generator))


def captured(n: int = 4) -> dict[str, Rows]:
    return {site.name: rows(site, n, seed) for seed, site in enumerate(SITES)}


def test_site_scope_keeps_one_set_of_moments_for_each_site() -> None:
    statistics = LNStatistics.empty(SITES, "site").updated(captured())
    assert dict(statistics.scope_of) == {"a": "a", "b": "b", "c": "c"}
    assert {name: moments.count for name, moments in statistics.gradients.items()} == {"a": 4, "b": 4, "c": 4}
    assert not torch.equal(statistics.gradients["a"].mean, statistics.gradients["b"].mean)
    alone = LNStatistics.empty(SITES[:1], "site").updated({"a": captured()["a"]})
    assert torch.equal(alone.gradients["a"].scatter, statistics.gradients["a"].scatter)


def test_shape_scope_shares_moments_between_sites_of_a_shape() -> None:
    statistics = LNStatistics.empty(SITES, "shape").updated(captured())
    assert dict(statistics.scope_of) == {"a": "3x2", "b": "3x2", "c": "2x3"}
    assert {key: moments.count for key, moments in statistics.keys.items()} == {"3x2": 8, "2x3": 4}
    both = torch.cat([captured()["a"].gradients, captured()["b"].gradients])
    assert torch.allclose(statistics.gradients["3x2"].mean, both.mean(dim=0), atol=1e-6)


def test_a_transposed_shape_is_another_shape() -> None:
    statistics = LNStatistics.empty(SITES, "shape")
    assert statistics.keys["3x2"].mean.shape == (3,) and statistics.gradients["3x2"].scatter.shape == (2, 2)
    assert statistics.keys["2x3"].mean.shape == (2,) and statistics.gradients["2x3"].scatter.shape == (3, 3)


def test_keys_are_diagonal_and_gradients_full() -> None:
    statistics = LNStatistics.empty(SITES, "site")
    assert not any(moments.full for moments in statistics.keys.values())
    assert all(moments.full for moments in statistics.gradients.values())


def test_an_update_leaves_the_old_statistics_alone() -> None:
    before = LNStatistics.empty(SITES, "site").updated(captured())
    kept = {name: tensor.clone() for name, tensor in before.tensors().items()}
    after = before.updated(captured(3))
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.tensors().items())
    assert after.keys["a"].count == 7


def test_a_site_that_is_not_captured_keeps_its_moments() -> None:
    before = LNStatistics.empty(SITES, "site").updated(captured())
    after = before.updated({"a": captured()["a"]})
    assert after.keys["b"] is before.keys["b"] and after.keys["a"].count == 8


def test_finite_sees_every_tensor() -> None:
    good = LNStatistics.empty(SITES, "site").updated(captured())
    assert all(good.finite())
    for name, tensor in good.tensors().items():
        if not name.endswith("count"):
            for value in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.view(-1)[-1] = value
                assert not all(good.loaded({**good.tensors(), name: broken}, "here").finite()), name


@pytest.mark.parametrize("scope", ["site", "shape"])
def test_tensors_round_trip(scope: str) -> None:
    statistics = LNStatistics.empty(SITES, scope).updated(captured())  # type: ignore[arg-type]
    again = LNStatistics.empty(SITES, scope).loaded(statistics.tensors(), "the file")  # type: ignore[arg-type]
    assert again.tensors().keys() == statistics.tensors().keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in statistics.tensors().items())
    assert again.keys[again.scope_of["a"]].count == statistics.keys[statistics.scope_of["a"]].count
    one, other = statistics.updated(captured(2)), again.updated(captured(2))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_tensor_names() -> None:
    names = LNStatistics.empty(SITES[:1], "site").tensors().keys()
    assert names == {
        f"a/{kind}/{part}" for kind in ("keys", "value_gradients") for part in ("count", "mean", "scatter")
    }


def without(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != name}


def test_a_file_that_does_not_fit_is_refused_with_every_difference() -> None:
    statistics = LNStatistics.empty(SITES, "site")
    tensors = statistics.tensors()
    wrong = without("a/keys/mean", tensors) | {
        "d/keys/mean": torch.zeros(3),
        "b/value_gradients/scatter": torch.zeros(5, 5),
        "c/keys/count": torch.tensor(0.0),
    }
    with pytest.raises(ValueError) as raised:
        statistics.loaded(wrong, "old.safetensors")
    message = str(raised.value)
    assert "The LN statistics in old.safetensors do not fit" in message
    assert "a/keys/mean: not in old.safetensors" in message
    assert "d/keys/mean: in old.safetensors, but not a statistic of this run" in message
    assert "b/value_gradients/scatter: [5, 5] torch.float32 in old.safetensors, [2, 2] torch.float32" in message
    assert "c/keys/count: [] torch.float32 in old.safetensors, [] torch.int64" in message


@pytest.mark.parametrize("name", ["a/keys/count", "c/value_gradients/scatter"])
def test_each_missing_tensor_is_noticed(name: str) -> None:
    statistics = LNStatistics.empty(SITES, "site")
    with pytest.raises(ValueError, match=f"{name}: not in it"):
        statistics.loaded(without(name, statistics.tensors()), "it")


def test_statistics_of_the_other_scope_are_refused() -> None:
    by_shape = LNStatistics.empty(SITES, "shape").tensors()
    with pytest.raises(ValueError, match="statistics_scope"):
        LNStatistics.empty(SITES, "site").loaded(by_shape, "it")


def test_rows_of_the_wrong_width_are_refused_and_change_nothing() -> None:
    statistics = LNStatistics.empty(SITES, "site")
    with pytest.raises(ValueError, match="expected rows"):
        statistics.updated({"a": rows(SITES[2], 4)})
    assert statistics.keys["a"].count == 0
