"""Lifelong normalization against the float64 oracle, and against what whitening promises."""

from dataclasses import replace

import pytest
import reference as ref
import torch
from tiny import relative_difference
from torch import Tensor

from stableedit_pl.method.moments import Moments
from stableedit_pl.method.normalization import (
    EPS,
    QUADRATURE_WIDTH,
    Affine,
    Normalization,
    NormalizedRows,
    Solver,
    WhiteningSolver,
    choose_solver,
    covariance,
    normalize,
    spectrum,
    standardizer,
    unit_root_mean_square,
    whiten,
)

D_IN, D_OUT = 7, 5


def rows(n: int, d: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Correlated rows off the origin; condition number of their covariance about 100."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
    x = torch.randn(n, d, generator=generator) * torch.logspace(0, 1, d)
    return (x @ rotation + torch.arange(d)) * scale


def moments_of(x: Tensor, full: bool) -> Moments:
    return Moments.empty(x.shape[1], full).updated(x)


def normalized(
    keys: Tensor, gradients: Tensor, method: Normalization = "whiten", prior: float = 1.0, floor: float = 0.0
) -> NormalizedRows:
    """Normalize rows by their own moments."""
    return normalize(keys, gradients, moments_of(keys, False), moments_of(gradients, True), method, prior, floor)


def by_reference(
    keys: Tensor, gradients: Tensor, method: Normalization = "whiten", prior: float = 1.0, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    statistics = ref.Statistics(keys.shape[1], gradients.shape[1])
    statistics.add(keys, gradients)
    return ref.normalize(
        keys.double(),
        gradients.double(),
        statistics,
        normalization=method,
        prior_strength=prior,
        eigenvalue_floor=floor,
    )


@pytest.mark.parametrize("n", [1, 2, 3, D_OUT, D_OUT + 1, D_OUT + 2, 40])
@pytest.mark.parametrize("method", ["whiten", "standardize", "none"])
@pytest.mark.parametrize("prior", [1.0, 0.1, 10.0, 0.0])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_every_method_matches_the_reference(n: int, method: Normalization, prior: float, floor: float) -> None:
    keys, gradients = rows(n, D_IN), rows(n, D_OUT, seed=1)
    got = normalized(keys, gradients, method, prior, floor)
    expected_keys, expected_gradients = by_reference(keys, gradients, method, prior, floor)
    assert relative_difference(got.keys, expected_keys) < 1e-5
    # At n = d_out + 2 the paper's estimate has eigenvalues near zero: only conditioning sets the tolerance.
    assert relative_difference(got.gradients, expected_gradients) < 1e-4
    whitened = method == "whiten" and n >= 2 and (prior > 0 or n > D_OUT + 1)
    assert got.solver == ("eigh" if whitened else None)


def root_of(moments: Moments, prior: float, floor: float, solver: Solver = "eigh") -> Tensor:
    """The root itself, float64: what whitening makes of the unit rows (moved by the mean that it takes off)."""
    centred = replace(moments, mean=torch.zeros_like(moments.mean))
    return whiten(torch.eye(len(moments.mean), dtype=torch.float64), centred, prior, floor, solver)


def test_methods_differ_from_each_other() -> None:
    """Negative control for the comparisons above."""
    keys, gradients = rows(40, D_IN), rows(40, D_OUT, seed=1)
    whiten, standardize, none = (normalized(keys, gradients, m) for m in ("whiten", "standardize", "none"))
    assert relative_difference(whiten.gradients, standardize.gradients) > 0.1
    assert relative_difference(none.gradients, standardize.gradients) > 0.1
    assert torch.equal(whiten.keys, standardize.keys) and torch.equal(none.keys, keys)
    assert relative_difference(whiten.gradients, normalized(keys, gradients, prior=0.0).gradients) > 0.1


def test_whitened_gradients_have_the_identity_covariance_when_rows_are_many() -> None:
    gradients = rows(20_000, D_OUT)
    white = normalized(rows(20_000, D_IN), gradients).gradients.double()
    centred = white - white.mean(dim=0)
    sample = centred.T @ centred / len(white)
    assert white.mean(dim=0).abs().max() < 1e-3
    assert (sample - torch.eye(D_OUT, dtype=torch.float64)).norm() < 0.02
    raw = gradients.double() - gradients.double().mean(dim=0)
    assert (raw.T @ raw / len(raw) - torch.eye(D_OUT, dtype=torch.float64)).norm() > 10  # it was not before


@pytest.mark.parametrize("solver", ["eigh", "quadrature"])
def test_the_root_is_symmetric_and_its_square_inverts_the_covariance(solver: Solver) -> None:
    moments = moments_of(rows(50, D_OUT), True)
    root = root_of(moments, 1.0, 0.0, solver)
    assert torch.allclose(root, root.T, rtol=0, atol=1e-6)
    identity = root @ covariance(moments, 1.0) @ root
    assert torch.allclose(identity, torch.eye(D_OUT, dtype=torch.float64), atol=1e-5)


def test_the_spectrum_is_the_covariances() -> None:
    moments = moments_of(rows(50, D_OUT), True)
    eigenvalues = spectrum(moments, 1.0, 0.0)
    assert torch.all(eigenvalues.diff() >= 0) and eigenvalues.dtype == torch.float64
    assert torch.allclose(eigenvalues, torch.linalg.eigh(covariance(moments, 1.0)).eigenvalues)


def test_standardized_rows_have_unit_unbiased_variance() -> None:
    keys = normalized(rows(30, D_IN), rows(30, D_OUT)).keys
    assert torch.allclose(keys.mean(dim=0), torch.zeros(D_IN), atol=1e-5)
    assert torch.allclose(keys.var(dim=0, unbiased=True), torch.ones(D_IN), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_whitening_does_not_depend_on_the_loss_scale(scale: float) -> None:
    keys, gradients = rows(9, D_IN), rows(9, D_OUT, seed=1)
    one = normalized(keys, gradients)
    other = normalized(keys, gradients * scale)
    assert relative_difference(other.gradients, one.gradients) < 1e-5
    eigenvalues = spectrum(moments_of(gradients, True), 1.0, 0.0)
    assert relative_difference(spectrum(moments_of(gradients * scale, True), 1.0, 0.0), eigenvalues * scale**2) < 1e-5


def test_an_absolute_floor_ties_the_result_to_the_loss_scale() -> None:
    """Negative control of the test above: this is what the default leaves out."""
    keys, gradients = rows(9, D_IN), rows(9, D_OUT, seed=1)
    one = normalized(keys, gradients, floor=1e-6)
    small = normalized(keys, gradients * 1e-5, floor=1e-6)
    assert relative_difference(small.gradients, one.gradients) > 0.5


@pytest.mark.parametrize("prior", [1.0, 0.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_gradients_stay_finite_and_bounded(prior: float, rank: int) -> None:
    n, d = 60, 20
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(n, rank, generator=generator) @ torch.randn(rank, d, generator=generator) * 1e-3
    got = normalized(rows(n, D_IN), gradients, prior=prior)
    assert torch.isfinite(got.gradients).all()
    # Directions in which nothing was seen must not blow up rounding: rows stay of the size sqrt(rank).
    assert got.gradients.norm(dim=1).max() < 5 * rank**0.5 + 1
    assert got.solver == "eigh" and spectrum(moments_of(gradients, True), prior, 0.0)[0] > 0


@pytest.mark.parametrize("prior", [1.0, 0.0])
@pytest.mark.parametrize("method", ["whiten", "standardize"])
def test_identical_rows_give_zeros_not_nan(prior: float, method: Normalization) -> None:
    keys, gradients = torch.full((30, D_IN), 0.1), torch.full((30, D_OUT), -1 / 3)
    got = normalized(keys, gradients, method, prior)
    assert torch.count_nonzero(got.keys) == 0 and torch.count_nonzero(got.gradients) == 0


def test_a_column_that_never_varies_is_zero_and_the_others_are_untouched() -> None:
    keys = rows(12, D_IN)
    constant = keys.clone()
    constant[:, 2] = 0.1
    moments = Moments.empty(D_IN, False).updated(constant[:5]).updated(constant[5:])
    got = standardizer(moments)(constant)
    assert torch.count_nonzero(got[:, 2]) == 0
    others = [0, 1, 3, 4, 5, 6]
    assert relative_difference(got[:, others], normalized(keys, rows(12, D_OUT)).keys[:, others]) < 1e-5


@pytest.mark.parametrize("method", ["whiten", "standardize"])
@pytest.mark.parametrize("prior", [1.0, 0.0])
def test_a_single_row_is_divided_by_its_root_mean_square(method: Normalization, prior: float) -> None:
    keys, gradients = rows(1, D_IN), rows(1, D_OUT, seed=1, scale=1e-6)
    got = normalized(keys, gradients, method, prior)
    assert got.keys.square().mean().item() == pytest.approx(1.0, rel=1e-5)
    assert got.gradients.square().mean().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(got.gradients, gradients).item() == pytest.approx(1.0, abs=1e-6)
    assert got.solver is None
    assert torch.count_nonzero(unit_root_mean_square(torch.zeros(2, 3))) == 0


def test_the_first_turn_of_one_row_is_left_as_it_is_without_normalization() -> None:
    keys, gradients = rows(1, D_IN), rows(1, D_OUT)
    got = normalized(keys, gradients, "none")
    assert torch.equal(got.keys, keys) and torch.equal(got.gradients, gradients)


def test_the_papers_prior_switches_to_whitening_exactly_after_d_out_plus_one_rows() -> None:
    keys, gradients = rows(D_OUT + 2, D_IN), rows(D_OUT + 2, D_OUT, seed=1)
    for n in range(2, D_OUT + 3):
        got = normalized(keys[:n], gradients[:n], prior=0.0)
        standardized = normalized(keys[:n], gradients[:n], "standardize")
        if n <= D_OUT + 1:
            assert torch.equal(got.gradients, standardized.gradients) and got.solver is None
        else:
            assert relative_difference(got.gradients, standardized.gradients) > 0.1 and got.solver == "eigh"


def test_covariance_is_the_stated_formula() -> None:
    gradients = rows(12, D_OUT)
    moments = moments_of(gradients, True)
    psi = moments.scatter.double()
    assert torch.allclose(covariance(moments, 0), psi / (12 - D_OUT - 1))
    p, tau = 2.5 * D_OUT, psi.trace() / (12 * D_OUT)
    expected = (psi + p * tau * torch.eye(D_OUT, dtype=torch.float64)) / (12 + p)
    assert torch.allclose(covariance(moments, 2.5), expected)
    # The prior keeps the average direction's variance: it changes shape, not scale.
    assert covariance(moments, 2.5).trace().item() == pytest.approx((psi.trace() / 12).item())


def test_the_prior_fades_as_rows_come_in() -> None:
    def distance(n: int) -> float:
        moments = moments_of(rows(n, D_OUT), True)
        return relative_difference(covariance(moments, 1.0), covariance(moments, 0))

    assert distance(20) > 10 * distance(2000) > 0


@pytest.mark.parametrize("floor", [0.0, 1e-3, 50.0])
def test_floors_clamp_the_eigenvalues(floor: float) -> None:
    gradients = rows(200, D_OUT)
    gradients[:, 0] = gradients[:, 1]  # one direction never varies
    moments = moments_of(gradients, True)
    eigenvalues, root = spectrum(moments, 0.0, floor), root_of(moments, 0.0, floor)
    raw = torch.linalg.eigvalsh(covariance(moments_of(gradients, True), 0.0))
    lowest = max(floor, EPS * raw[-1].item())
    assert eigenvalues[0].item() == pytest.approx(lowest, rel=1e-9)
    assert torch.allclose(eigenvalues, raw.clamp(min=lowest))
    assert torch.linalg.matrix_norm(root, 2).item() == pytest.approx(lowest**-0.5, rel=1e-4)


def test_moments_of_earlier_turns_count() -> None:
    earlier, keys, gradients = rows(50, D_OUT, seed=5, scale=3.0), rows(4, D_IN), rows(4, D_OUT, seed=1)
    own = moments_of(gradients, True)
    lifelong = moments_of(earlier, True).updated(gradients)
    key_moments = moments_of(keys, False)
    a = normalize(keys, gradients, key_moments, own, "whiten")
    b = normalize(keys, gradients, key_moments, lifelong, "whiten")
    assert relative_difference(a.gradients, b.gradients) > 0.1


def test_inputs_are_not_changed_and_types_are_kept() -> None:
    keys, gradients = rows(9, D_IN), rows(9, D_OUT)
    kept = keys.clone(), gradients.clone()
    got = normalized(keys, gradients)
    assert torch.equal(keys, kept[0]) and torch.equal(gradients, kept[1])
    assert got.keys.dtype == got.gradients.dtype == torch.float32
    assert got.keys.shape == keys.shape and got.gradients.shape == gradients.shape


def test_affine_takes_off_the_mean_and_scales() -> None:
    x, mean = torch.tensor([[3.0, 5.0]]), torch.tensor([1.0, 1.0])
    assert torch.equal(Affine(mean, torch.tensor([2.0, 3.0]))(x), torch.tensor([[4.0, 12.0]]))
    assert torch.equal(x, torch.tensor([[3.0, 5.0]]))


# ---- who takes the inverse root


@pytest.mark.parametrize(
    ("wanted", "width", "device", "chosen"),
    [
        ("auto", QUADRATURE_WIDTH - 1, "cpu", "eigh"),
        ("auto", QUADRATURE_WIDTH, "cpu", "quadrature"),
        ("auto", 4, "cuda", "quadrature"),
        ("eigh", QUADRATURE_WIDTH, "cuda", "eigh"),
        ("quadrature", 4, "cpu", "quadrature"),
    ],
)
def test_the_solver_follows_device_and_width_unless_it_is_named(
    wanted: WhiteningSolver, width: int, device: str, chosen: str
) -> None:
    assert choose_solver(wanted, 1000, width, torch.device(device), 1.0, 0.0) == chosen


@pytest.mark.parametrize("wanted", ["auto", "quadrature"])
@pytest.mark.parametrize(
    ("count", "prior", "floor", "possible"),
    [
        (1000, 0.0, 0.0, False),
        (1000, 1.0, 1e-9, False),
        (8_000_000, 1.0, 0.0, True),
        (9_000_000, 1.0, 0.0, False),  # the clamp at epsilon times the largest eigenvalue could be active
        (80_000, 0.01, 0.0, True),
        (90_000, 0.01, 0.0, False),
    ],
)
def test_quadrature_is_left_alone_where_eigenvalues_may_be_clamped(
    wanted: WhiteningSolver, count: int, prior: float, floor: float, possible: bool
) -> None:
    chosen = choose_solver(wanted, count, 4096, torch.device("cuda"), prior, floor)
    assert chosen == ("quadrature" if possible else "eigh")


@pytest.mark.parametrize("n", [2, 3, 40, 3000])
@pytest.mark.parametrize("prior", [1.0, 0.1, 10.0])
def test_both_solvers_give_the_reference(n: int, prior: float) -> None:
    keys, gradients = rows(n, D_IN), rows(n, D_OUT, seed=1, scale=1e-6)
    moments = moments_of(keys, False), moments_of(gradients, True)
    _, expected = by_reference(keys, gradients, prior=prior)
    for solver in ("eigh", "quadrature"):
        got = normalize(keys, gradients, *moments, "whiten", prior, solver=solver)  # type: ignore[arg-type]
        assert got.solver == solver and relative_difference(got.gradients, expected) < 1e-5
