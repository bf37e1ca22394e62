"""Running moments: streamed equals batch, whatever the pieces, and nothing ever changes in place."""

import dataclasses
from typing import Any

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_difference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stableedit_pl.method.moments import Moments


def random_rows(n: int, d: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mixing + offset


def streamed(rows: Tensor, sizes: list[int], full: bool) -> Moments:
    moments = Moments.empty(rows.shape[1], full)
    for piece in rows.split(sizes):
        moments = moments.updated(piece)
    return moments


def reference(rows: Tensor, full: bool) -> ref.Moments:
    statistics = ref.Statistics(rows.shape[1], rows.shape[1])
    statistics.add(rows, rows)
    return statistics.gradient_moments() if full else statistics.key_moments()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1),
    width=st.integers(1, 6),
    offset=st.sampled_from([0.0, -3.0, 30.0]),
    full=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_chunking_gives_the_batch_moments(
    sizes: list[int], width: int, offset: float, full: bool, seed: int
) -> None:
    rows = random_rows(sum(sizes), width, seed, offset)
    moments, expected = streamed(rows, sizes, full), reference(rows, full)
    assert moments.count == expected.count
    assert torch.allclose(moments.mean.double(), expected.mean, rtol=1e-5, atol=1e-5)
    # Rounding of the shift between batch means scales with the offset, not with the scatter.
    slack = 1e-5 * (expected.scatter.abs().max() + sum(sizes) * abs(offset))
    assert torch.allclose(moments.scatter.double(), expected.scatter, rtol=1e-5, atol=float(slack))


@pytest.mark.parametrize("full", [True, False])
def test_shapes_and_rounding_of_many_small_batches(full: bool) -> None:
    rows = random_rows(2000, 5, offset=2.0)
    moments, expected = streamed(rows, [1] * 2000, full), reference(rows, full)
    assert moments.full is full
    assert moments.scatter.shape == ((5, 5) if full else (5,))
    assert moments.mean.dtype == moments.scatter.dtype == torch.float32
    assert relative_difference(moments.mean, expected.mean) < 1e-5
    assert relative_difference(moments.scatter, expected.scatter) < 1e-4


def test_order_of_batches_is_of_no_consequence() -> None:
    rows = random_rows(40, 4, offset=1.0)
    forwards = streamed(rows, [10] * 4, full=True)
    backwards = streamed(rows.flip(0), [10] * 4, full=True)
    assert relative_difference(forwards.scatter, backwards.scatter) < 1e-5


def test_the_scatter_is_about_the_mean_not_the_origin() -> None:
    """Negative control: without the shift term between batch means the sum would be far too small."""
    rows = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    moments = streamed(rows, [2, 2], full=False)
    assert moments.mean.item() == 5.0
    assert moments.scatter.item() == 100.0


def test_diagonal_moments_are_the_diagonal_of_full_ones() -> None:
    rows = random_rows(30, 6)
    full, diagonal = streamed(rows, [7, 23], True), streamed(rows, [7, 23], False)
    assert torch.equal(full.mean, diagonal.mean)
    assert relative_difference(full.scatter.diagonal(), diagonal.scatter) < 1e-6
    # To rounding only: a product need not be symmetric to the last bit, and the solvers read one triangle.
    assert relative_difference(full.scatter, full.scatter.T) < 1e-6


def test_the_count_is_an_exact_integer_past_two_to_the_24() -> None:
    count = 2**24
    moments = Moments(count, torch.zeros(2), torch.ones(2))
    for expected in (count + 1, count + 2):
        moments = moments.updated(torch.ones(1, 2))
        assert moments.count == expected and isinstance(moments.count, int)
    again = Moments.from_tensors(moments.tensors())
    assert again.count == count + 2
    assert float(torch.tensor(float(count), dtype=torch.float32) + 1) == count  # what a float32 count would have done


@pytest.mark.parametrize("value", [0.1, -1234.567, 1e-20, 3e5])
@pytest.mark.parametrize("sizes", [[3], [1, 1, 1], [2, 5, 1]])
@pytest.mark.parametrize("full", [True, False])
def test_equal_rows_have_exactly_no_scatter(value: float, sizes: list[int], full: bool) -> None:
    rows = torch.full((sum(sizes), 3), value) * torch.tensor([1.0, 1 / 3, -7.0])
    moments = streamed(rows, sizes, full)
    assert torch.count_nonzero(moments.scatter) == 0
    assert torch.equal(moments.mean, rows[0])


def test_updates_leave_the_old_moments_alone() -> None:
    moments = streamed(random_rows(5, 3), [5], full=True)
    before = {name: tensor.clone() for name, tensor in moments.tensors().items()}
    rows = random_rows(4, 3, seed=1)
    kept = rows.clone()
    after = moments.updated(rows)
    assert all(torch.equal(before[name], tensor) for name, tensor in moments.tensors().items())
    assert torch.equal(rows, kept)
    assert after.count == 9 and not torch.equal(after.mean, moments.mean)
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments.count = 7  # type: ignore[misc]


def test_the_moments_do_not_share_memory_with_the_rows() -> None:
    rows = random_rows(1, 3)
    moments = Moments.empty(3, full=False).updated(rows)
    kept = moments.mean.clone()
    rows.fill_(99.0)
    assert torch.equal(moments.mean, kept)


def test_no_rows_change_nothing() -> None:
    moments = streamed(random_rows(5, 3), [5], full=True)
    assert moments.updated(torch.empty(0, 3)) is moments


def test_one_row_has_a_mean_and_no_scatter() -> None:
    row = random_rows(1, 3)
    moments = Moments.empty(3, full=True).updated(row)
    assert moments.count == 1 and torch.equal(moments.mean, row[0])
    assert torch.count_nonzero(moments.scatter) == 0


@pytest.mark.parametrize("full", [True, False])
def test_tensors_round_trip(full: bool) -> None:
    moments = streamed(random_rows(5, 3), [2, 3], full)
    tensors = moments.tensors()
    assert tensors["count"].dtype == torch.int64 and tensors["count"].shape == ()
    again = Moments.from_tensors(tensors)
    assert again.count == moments.count and again.full is full
    assert torch.equal(again.mean, moments.mean) and torch.equal(again.scatter, moments.scatter)
    rows = random_rows(4, 3, seed=2)
    assert torch.equal(again.updated(rows).scatter, moments.updated(rows).scatter)
    moved = moments.to("cpu")
    assert moved.count == moments.count and torch.equal(moved.scatter, moments.scatter)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 2), (1, 2, 3)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected rows \[m, 3\]") as raised:
        Moments.empty(3, full=True).updated(torch.zeros(shape))
    assert str(list(shape)) in str(raised.value)


def test_the_products_are_not_left_to_the_precision_of_float32_ones() -> None:
    """TF32 keeps ten bits of each factor: an error of 1e-4 of the scatter. Only the last rounding may show."""
    rows = random_rows(300, 40) * torch.logspace(0, -2, 40)
    asked: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                asked.append(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    with Products():
        moments = Moments.empty(40, full=True).updated(rows)
    assert asked == [torch.float64]
    exact = (rows.double() - moments.mean.double()).T @ (rows.double() - moments.mean.double())
    assert relative_difference(moments.scatter, exact) < 2e-7
