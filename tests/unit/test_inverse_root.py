"""Elliptic functions against their identities, quadrature against the eigendecomposition."""

import math

import pytest
import torch
from tiny import relative_difference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stableedit_pl.method.inverse_root import (
    TOLERANCE,
    apply_by_eigh,
    apply_by_quadrature,
    clamped_eigenvalues,
    elliptic_k,
    inverse_root_of,
    jacobi,
    quadrature_nodes,
    root_operations,
)

KAPPAS = [1.0, 1.5, 3.0, 301.0, 1e4, 1e6, 8e6]


def scatter_of(n: int, d: int, decades: float = 2.0, seed: int = 0) -> Tensor:
    """Float32 scatter of n rows whose standard deviations span so many decades, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -decades, d) @ basis
    return (rows.T @ rows).float()


def covariance_of(scatter: Tensor, n: int, prior: float) -> Tensor:
    d = len(scatter)
    p, tau = prior * d, scatter.double().trace() / (n * d)
    return (scatter.double() + p * tau * torch.eye(d, dtype=torch.float64)) / (n + p)


def test_the_elliptic_integral_has_its_known_values() -> None:
    assert elliptic_k(1.0) == pytest.approx(math.pi / 2, rel=1e-15)
    assert elliptic_k(0.5) == pytest.approx(math.gamma(0.25) ** 2 / (4 * math.sqrt(math.pi)), rel=1e-14)
    assert elliptic_k(1e-12) == pytest.approx(0.5 * math.log(16e12), rel=1e-11)  # its asymptote


@pytest.mark.parametrize("complement", [1.0, 0.7, 0.5, 1e-3, 1e-7])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_jacobi_functions_obey_their_identities(complement: float, part: float) -> None:
    m, k = 1 - complement, elliptic_k(complement)
    u = part * k
    sn, cn, dn = jacobi(u, complement)
    assert sn**2 + cn**2 == pytest.approx(1, rel=1e-14)
    assert dn**2 + m * sn**2 == pytest.approx(1, rel=1e-13)
    # Mirrored at the quarter period.
    mirrored_sn, mirrored_cn, mirrored_dn = jacobi(k - u, complement)
    root = math.sqrt(complement)
    assert (mirrored_sn, mirrored_cn, mirrored_dn) == pytest.approx((cn / dn, root * sn / dn, root / dn), rel=1e-9)
    # d sn / du = cn dn: the functions belong to this argument, not to another.
    h = 1e-5 * k
    slope = (jacobi(u + h, complement)[0] - jacobi(u - h, complement)[0]) / (2 * h)
    assert slope == pytest.approx(cn * dn, rel=1e-6, abs=1e-9)


def test_jacobi_functions_at_the_ends_of_the_parameter() -> None:
    assert jacobi(0.7, 1.0) == pytest.approx((math.sin(0.7), math.cos(0.7), 1.0), rel=1e-14)
    sech = 1 / math.cosh(0.7)
    assert jacobi(0.7, 1e-16) == pytest.approx((math.tanh(0.7), sech, sech), rel=1e-12)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("tolerance", [1e-3, TOLERANCE, 1e-10])
def test_the_error_is_within_tolerance_on_the_whole_interval(kappa: float, tolerance: float) -> None:
    nodes = quadrature_nodes(kappa, tolerance)
    errors = [abs(inverse_root_of(x, nodes) * math.sqrt(x) - 1) for x in (kappa ** (i / 1000) for i in range(1001))]
    assert max(errors) <= tolerance * 1.01
    assert all(shift >= 0 and weight > 0 for shift, weight in nodes) and list(nodes) == sorted(nodes)


def test_the_number_of_nodes_grows_like_the_logarithm() -> None:
    """Hale, Higham and Trefethen: J ~ (ln kappa + 3) ln(2 / tolerance) / (2 pi^2)."""
    counts = [len(quadrature_nodes(kappa)) for kappa in KAPPAS]
    predicted = [(math.log(kappa) + 3) * math.log(2 / TOLERANCE) / (2 * math.pi**2) for kappa in KAPPAS]
    assert counts == sorted(counts) and counts[3] == 7 and counts[-1] == 15
    assert all(count - 3 < expected < count + 3 for count, expected in zip(counts, predicted, strict=True))


@pytest.mark.parametrize("n", [2, 10, 63, 300, 100_000])
@pytest.mark.parametrize("prior", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_quadrature_is_the_inverse_root(n: int, prior: float, scale: float) -> None:
    scatter = scatter_of(min(n, 400), 64) * max(1.0, n / 400) * scale
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = apply_by_quadrature(scatter, n, prior, rows)
    expected = apply_by_eigh(covariance_of(scatter, n, prior), 0.0, rows)
    assert got.dtype == torch.float64 and got.shape == rows.shape
    assert relative_difference(got, expected) < 2 * TOLERANCE


def test_the_worst_spectrum_that_the_bound_allows_is_still_within_it() -> None:
    """All variance in one direction: kappa is exactly 1 + n / prior_strength."""
    n, d = 200_000, 16
    scatter = torch.zeros(d, d)
    scatter[0, 0] = float(n)
    eigenvalues = torch.linalg.eigvalsh(covariance_of(scatter, n, 1.0))
    assert (eigenvalues[-1] / eigenvalues[0]).item() == pytest.approx(1 + n, rel=1e-9)
    rows = torch.eye(d, dtype=torch.float64)
    got = apply_by_quadrature(scatter, n, 1.0, rows)
    assert torch.allclose(got.diagonal(), covariance_of(scatter, n, 1.0).diagonal().rsqrt(), rtol=1.1e-6, atol=0)


def test_the_root_is_symmetric_and_whitens() -> None:
    scatter, eye = scatter_of(500, 32), torch.eye(32, dtype=torch.float64)
    root = apply_by_quadrature(scatter, 500, 1.0, eye)
    assert relative_difference(root, root.T) < 1e-12
    assert torch.allclose(root @ covariance_of(scatter, 500, 1.0) @ root, eye, atol=1e-5)


def test_only_the_lower_triangle_counts() -> None:
    """Products leave the two triangles different in the last bit."""
    scatter, rows = scatter_of(100, 8), torch.randn(3, 8)
    assert torch.equal(
        apply_by_quadrature(scatter.tril(), 100, 1.0, rows), apply_by_quadrature(scatter, 100, 1.0, rows)
    )


def test_no_scatter_gives_zeros_and_inputs_are_left_alone() -> None:
    rows, scatter = torch.randn(3, 8), torch.zeros(8, 8)
    assert torch.count_nonzero(apply_by_quadrature(scatter, 5, 1.0, rows)) == 0
    assert torch.count_nonzero(apply_by_eigh(torch.zeros(8, 8, dtype=torch.float64), 0.0, rows)) == 0
    assert torch.count_nonzero(scatter) == 0
    scatter, kept = scatter_of(100, 8), scatter_of(100, 8)
    got = apply_by_quadrature(scatter, 100, 1.0, rows)
    assert torch.equal(scatter, kept) and got.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_no_covariance_are_never_taken_for_one(value: float) -> None:
    """Nothing is raised, because that would need a look at the numbers: what comes out is not finite."""
    rows, scatter = torch.randn(3, 8), scatter_of(100, 8)
    scatter[2, 1] = value
    assert not torch.isfinite(apply_by_quadrature(scatter, 100, 1.0, rows)).all()
    scatter = scatter_of(100, 8)
    scatter[1, 1] = -2 * scatter.trace()
    assert not torch.isfinite(apply_by_quadrature(scatter, 100, 1.0, rows)).any()
    indefinite = scatter_of(100, 8)
    indefinite[2, 1] = 100 * indefinite.trace()
    assert not torch.isfinite(apply_by_quadrature(indefinite, 100, 1.0, rows)).any()


def test_eigenvalues_are_clamped_by_floor_and_epsilon() -> None:
    values = torch.tensor([-1.0, 1e-9, 1.0, 4.0], dtype=torch.float64)
    lowest = 4 * torch.finfo(torch.float32).eps
    assert clamped_eigenvalues(values, 0.0).tolist() == [lowest, lowest, 1.0, 4.0]
    assert clamped_eigenvalues(values, 2.0).tolist() == [2.0, 2.0, 2.0, 4.0]


def test_operations_of_a_root_are_those_of_its_products_and_factors() -> None:
    rows, covariance = torch.randn(9, 5), torch.eye(5, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:  # of products; it does not know factorizations
        apply_by_eigh(covariance, 0.0, rows)
    assert root_operations(9, 5, None) == pytest.approx(9 * 5**3 + counter.get_total_flops())
    factor, solves = 5**3 / 3, 2 * 9 * 5**2
    assert root_operations(9, 5, 7) == pytest.approx(7 * (factor + solves))
