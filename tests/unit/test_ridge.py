"""The ridge regression: two closed forms of one solution, held against augmented least squares."""

import logging

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_difference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stableedit_pl.method import ridge as ridge_module
from stableedit_pl.method.ridge import SiteUpdate, ridge_operations, targets, unsolvable


def ridge_update(keys: Tensor, values: Tensor, ridge: float) -> SiteUpdate:
    """The update of a system that can be solved."""
    update, failed = ridge_module.ridge_update(keys, values, ridge)
    assert failed.item() == 0 and failed.dim() == 0
    return update


def problem(n: int, d_in: int, d_out: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator), torch.randn(n, d_out, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 5),
    ridge=st.sampled_from([1e-2, 1.0, 10.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_the_update_is_the_ridge_solution(n: int, d_in: int, d_out: int, ridge: float, seed: int) -> None:
    keys, values = problem(n, d_in, d_out, seed)
    got = ridge_update(keys, values, ridge).dense()
    assert got.shape == (d_in, d_out) and got.dtype == torch.float32
    assert relative_difference(got, ref.ridge_update(keys, values, ridge)) < 1e-4


def test_dual_and_primal_are_one_solution() -> None:
    """The same problem through both branches: a key dimension of zeros moves it from primal to dual."""
    keys, values = problem(6, 6)
    padded = torch.cat([keys, torch.zeros(6, 1)], dim=1)
    primal, dual = ridge_update(keys, values, 0.5), ridge_update(padded, values, 0.5)
    assert primal.left.shape == (6, 6) and torch.equal(primal.left, torch.eye(6))
    assert dual.left is padded and dual.right.shape == (6, 4)
    assert relative_difference(dual.dense()[:6], primal.dense()) < 1e-4
    assert torch.count_nonzero(dual.dense()[6]) == 0


@pytest.mark.parametrize("n", [3, 30])
def test_the_update_is_a_minimum(n: int) -> None:
    keys, values = (x.double() for x in problem(n, 8))
    delta = ridge_update(keys.float(), values.float(), 2.0).dense().double()

    def objective(x: Tensor) -> float:
        return float((keys @ x - values).square().sum() + 2.0 * x.square().sum())

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        step = torch.randn(delta.shape, generator=generator, dtype=torch.float64) * 0.01
        assert objective(delta + step) > objective(delta)


def test_a_larger_ridge_gives_a_smaller_update() -> None:
    keys, values = problem(5, 9)
    norms = [ridge_update(keys, values, ridge).norm().item() for ridge in (1e-2, 1.0, 1e2, 1e4)]
    assert norms == sorted(norms, reverse=True) and norms[0] > 100 * norms[-1]


def test_order_of_rows_is_of_no_consequence() -> None:
    keys, values = problem(5, 9)
    order = torch.tensor([3, 0, 4, 1, 2])
    one, other = ridge_update(keys, values, 1.0), ridge_update(keys[order], values[order], 1.0)
    assert relative_difference(other.dense(), one.dense()) < 1e-5


def test_zero_values_give_exactly_no_update_and_others_do_not() -> None:
    keys, values = problem(5, 9)
    assert ridge_update(keys, torch.zeros_like(values), 1.0).norm().item() == 0.0
    assert ridge_update(keys, values, 1.0).norm().item() > 0.1


def test_a_site_update_is_its_dense_matrix() -> None:
    a, b = SiteUpdate(*problem(3, 7, 5)), SiteUpdate(*problem(6, 7, 5, seed=1))
    assert torch.equal(a.dense(), a.left.T @ a.right) and a.dense().shape == (7, 5)
    dense_a, dense_b = a.left.double().T @ a.right.double(), b.left.double().T @ b.right.double()
    assert a.inner(b).item() == pytest.approx((dense_a * dense_b).sum().item(), rel=1e-12)
    assert a.inner(b).item() == pytest.approx(b.inner(a).item(), rel=1e-12)
    assert a.norm().item() == pytest.approx(dense_a.norm().item(), rel=1e-12)
    assert a.norm().dtype == a.inner(b).dtype == torch.float64


def test_the_norm_is_never_nan_when_factors_cancel() -> None:
    left = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert SiteUpdate(left, torch.tensor([[1.0], [1.0]])).norm().item() == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_the_norm_is_never_nan_when_rounding_makes_its_square_negative(seed: int) -> None:
    left, right = problem(3, 5, seed=seed)
    nothing = SiteUpdate(torch.cat([left, -left]), torch.cat([right, right]))
    assert nothing.norm().item() == pytest.approx(0.0, abs=1e-6)


def test_the_norm_survives_numbers_whose_squares_underflow_float32() -> None:
    update = SiteUpdate(torch.full((1, 2), 1e-15), torch.full((1, 2), 1e-15))
    assert update.norm().item() == pytest.approx(2e-30, rel=1e-5)


def test_targets_scale_each_gradient_by_its_keys_squared_norm() -> None:
    keys, gradients = problem(4, 6)
    got = targets(keys, gradients, 0.3)
    assert relative_difference(got, ref.targets(keys.double(), gradients.double(), 0.3)) < 1e-6
    assert torch.equal(
        targets(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]]), 0.5), torch.tensor([[-12.5, 25.0]])
    )


@pytest.mark.parametrize(
    ("keys", "values"), [((3, 4), (2, 5)), ((4,), (4, 5)), ((3, 4), (3,)), ((1, 3, 4), (3, 5)), ((0, 4), (1, 5))]
)
def test_shapes_that_do_not_belong_together_are_refused(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected keys \[N, d_in\] and values \[N, d_out\]") as raised:
        ridge_update(torch.ones(keys), torch.ones(values), 1.0)
    assert str(list(keys)) in str(raised.value) and str(list(values)) in str(raised.value)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("n", [2, 9])
def test_a_ridge_that_is_not_positive_is_refused(ridge: float, n: int) -> None:
    with pytest.raises(ValueError, match="ridge must be positive, got"):
        ridge_update(*problem(n, 4), ridge)


def test_keys_that_float32_cannot_tell_from_singular_are_solved() -> None:
    """Three equal rows and a ridge that float32 rounds away: singular in float32, well defined in float64."""
    keys, values = torch.full((3, 4), 1024.0), torch.tensor([[2.0, -1.0]] * 3)
    got = ridge_update(keys, values, 1e-2).dense()
    assert relative_difference(got, ref.ridge_update(keys, values, 1e-2)) < 1e-5


def test_float64_keeps_what_edits_with_the_same_keys_agree_on() -> None:
    """Equal keys with different values: the dual coefficients are large and cancel; float32 keeps none of the rest."""
    keys, values = torch.full((3, 4), 1024.0), torch.tensor([[1.0], [2.0], [3.0]])
    got = ridge_update(keys, values, 1e-2)
    assert relative_difference(got.dense(), ref.ridge_update(keys, values, 1e-2)) < 1e-3


def test_float64_takes_over_for_collinear_keys() -> None:
    """The system is positive definite; only its float32 Gram matrix is not."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 40, generator=generator) * torch.linspace(1, 2, 12)[:, None] * 1e3
    values = torch.randn(12, 3, generator=generator)
    got = ridge_update(keys, values, 10.0)
    assert relative_difference(got.dense(), ref.ridge_update(keys, values, 10.0)) < 1e-3


@pytest.mark.parametrize("agreement", [1.0, 0.1])
def test_similar_keys_cost_few_digits(agreement: float) -> None:
    """Ten groups of near-equal keys of squared norm 1000 at ridge 10: well inside what float32 can do."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(10, 60, generator=generator).repeat(4, 1) + agreement * torch.randn(40, 60, generator=generator)
    keys = keys / keys.norm(dim=1, keepdim=True) * 1000**0.5
    values = torch.randn(40, 6, generator=generator)
    assert relative_difference(ridge_update(keys, values, 10.0).dense(), ref.ridge_update(keys, values, 10.0)) < 1e-4


def test_an_ordinary_system_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ridge_update(*problem(3, 4), 1.0)
    assert not caplog.records


@pytest.mark.parametrize("n", [3, 9])
def test_keys_that_are_not_finite_fail_without_an_exception(n: int) -> None:
    """An exception would have to wait for the device; the verdict is a number like any other."""
    keys, values = problem(n, 4)
    keys[0, 0] = float("nan")
    update, failed = ridge_module.ridge_update(keys, values, 1.0)
    assert failed.item() != 0
    size = min(n, 4)
    assert unsolvable(update, 1.0).startswith(f"the {size}x{size} ridge system is not positive definite")


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(5, 12, 7), (12, 5, 7)])
def test_operations_are_those_of_the_products_and_the_solve(rows: int, d_in: int, d_out: int) -> None:
    with FlopCounterMode(display=False) as counter:  # of products; it does not know factorizations
        ridge_update(torch.randn(rows, d_in), torch.randn(rows, d_out), 1.0)
    rank = min(rows, d_in)
    solve = rank**3 / 3 + 2 * rank**2 * d_out
    assert ridge_operations(rows, d_in, d_out) == pytest.approx(counter.get_total_flops() + solve)
