"""Whitening by float32 solves, where the spectrum allows them, against eigendecomposition in float64."""

import math
from typing import Any

import pytest
import torch
from tiny import relative_difference
from torch import Tensor

from stableedit_pl.method.inverse_root import condition_bound
from stableedit_pl.method.moments import Moments
from stableedit_pl.method.normalization import SINGLE_TOLERANCE, allows_single, covariance, normalize, whiten


def wide_moments(spread: float, turns: int = 3) -> tuple[Moments, Tensor]:
    """Moments of rows of 1024 dimensions whose scales fall by ``spread`` from the first to the last."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -math.log10(spread), 1024)
    moments = Moments.empty(1024, full=True)
    for _ in range(turns):
        moments = moments.updated(torch.randn(300, 1024) * scales)
    return moments, torch.randn(40, 1024) * scales


def test_wide_gradients_are_whitened_in_float32_where_that_is_accurate() -> None:
    moments, rows = wide_moments(spread=30)
    keys = Moments.empty(8, full=False).updated(torch.randn(9, 8))
    done = normalize(torch.randn(40, 8), rows, keys, moments, "whiten")
    assert done.solver == "quadrature (float32)"
    exact = whiten(rows.double(), moments, 1.0, 0.0, "eigh")
    assert relative_difference(done.gradients, exact) < SINGLE_TOLERANCE + 1e-5


@pytest.mark.parametrize("reason", ["conditioned badly", "improper prior", "floor", "forced"])
def test_float32_solves_are_not_used_where_they_would_not_be_accurate(reason: str) -> None:
    moments, rows = wide_moments(spread=30, turns=4)
    prior, floor = (0.0 if reason == "improper prior" else 1.0), (1e-9 if reason == "floor" else 0.0)
    if reason == "conditioned badly":  # one direction has it all, and thousands of rows say so
        moments = Moments(200_000, moments.mean, moments.scatter + 1e9 * torch.eye(1024)[:1].T @ torch.eye(1024)[:1])
        assert not allows_single(moments, 1.0)
    keys = Moments.empty(8, full=False).updated(torch.randn(9, 8))
    wanted: Any = "eigh" if reason == "forced" else "auto"
    done = normalize(torch.randn(40, 8), rows, keys, moments, "whiten", prior, floor, wanted)
    assert done.solver == "eigh"


def test_the_bound_on_the_condition_number_holds() -> None:
    for spread in (2.0, 30.0, 1e3):
        moments, _ = wide_moments(spread)
        eigenvalues = torch.linalg.eigvalsh(covariance(moments, 0.5))
        true = float(eigenvalues[-1] / eigenvalues[0])
        assert true <= condition_bound(moments.scatter, moments.count, 0.5) <= 1 + moments.count / 0.5
    assert condition_bound(torch.zeros(4, 4), 3, 1.0) == 1.0
