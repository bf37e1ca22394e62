"""A turn's plan against the oracle's, and what a plan refuses to hand on."""

from dataclasses import dataclass

import pytest
import reference as ref
import torch
from tiny import absolute, relative_difference
from torch import nn

from stableedit_pl.errors import SettingError
from stableedit_pl.method.planning import BadTurn, TurnPlan, plan_turn
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics, Rows


@dataclass
class Shape:
    name: str
    d_in: int
    d_out: int


SITES = [Shape("a", 6, 4), Shape("b", 6, 4), Shape("c", 4, 5)]


def turn(n: int, seed: int, scale: float = 1.0) -> dict[str, Rows]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: Rows(
            torch.randn(n, site.d_in, generator=generator) + 0.5,
            torch.randn(n, site.d_out, generator=generator) * scale,
        )
        for site in SITES
    }


def snapshot(statistics: LNStatistics) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in statistics.tensors().items()}


@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
@pytest.mark.parametrize("prior", [1.0, 0.0])
def test_several_turns_match_the_reference(scope: str, normalization: str, prior: float) -> None:
    """One row, fewer rows than dimensions, more rows than dimensions; sites that share moments."""
    settings = absolute(normalization, 0.1, 2.0, prior)  # type: ignore[arg-type]
    statistics = LNStatistics.empty(SITES, scope)  # type: ignore[arg-type]
    modules: dict[str, nn.Module] = {site.name: nn.Linear(site.d_in, site.d_out) for site in SITES}
    oracle = ref.scoped_statistics(modules, scope)  # type: ignore[arg-type]
    for number, n in enumerate([1, 3, 8, 5]):
        rows = turn(n, number, scale=1e-3)
        plan = plan_turn(rows, statistics, settings)
        for name, given in rows.items():
            oracle[name].add(given.keys, given.gradients)
        expected = ref.turn_updates(
            modules,
            {name: (given.keys.double(), given.gradients.double()) for name, given in rows.items()},
            oracle,
            normalization=normalization,  # type: ignore[arg-type]
            scales=dict.fromkeys("abc", ref.Scale(0.1, 2.0)),
            prior_strength=prior,
            eigenvalue_floor=0.0,
        )
        for name, delta in expected.items():
            assert relative_difference(plan.updates[name].dense().T, delta) < 2e-4, (number, name)
        statistics = plan.statistics


def test_the_moments_include_the_turn_that_they_normalize() -> None:
    rows, empty = turn(4, 0), LNStatistics.empty(SITES, "site")
    plan = plan_turn(rows, empty, absolute())
    assert plan.statistics.gradients["a"].count == 4
    assert plan.solvers == {"a": "eigh", "b": "eigh", "c": "eigh"}


def test_planning_writes_nothing() -> None:
    rows, before = turn(4, 0), LNStatistics.empty(SITES, "site").updated(turn(9, 1))
    kept, keys = snapshot(before), rows["a"].keys.clone()
    plan_turn(rows, before, absolute())
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.tensors().items())
    assert torch.equal(rows["a"].keys, keys)


def test_a_statistics_only_turn_feeds_the_moments_and_nothing_else() -> None:
    rows = turn(4, 0)
    plan = plan_turn(rows, LNStatistics.empty(SITES, "site"), absolute(), update_weights=False)
    full = plan_turn(rows, LNStatistics.empty(SITES, "site"), absolute())
    assert plan.updates == {} and plan.solvers == {} and plan.norms == {}
    assert all(torch.equal(t, full.statistics.tensors()[n]) for n, t in plan.statistics.tensors().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["keys", "gradients"])
@pytest.mark.parametrize("update_weights", [True, False])
def test_rows_that_are_not_finite_are_refused_naming_the_site(value: float, part: str, update_weights: bool) -> None:
    rows = turn(4, 0)
    getattr(rows["b"], part)[2, 1] = value
    with pytest.raises(BadTurn, match="site b are not finite"):
        plan_turn(rows, LNStatistics.empty(SITES, "site"), absolute(), update_weights)


def test_moments_that_overflow_are_refused() -> None:
    rows = turn(4, 0, scale=1e30)
    with pytest.raises(BadTurn, match="statistics would not be finite"):
        plan_turn(rows, LNStatistics.empty(SITES, "site"), absolute())


def test_an_update_that_overflows_is_refused_with_a_way_out() -> None:
    with pytest.raises(BadTurn, match=r"update of a, b, c is not finite; a smaller step_size or a larger ridge"):
        plan_turn(turn(4, 0), LNStatistics.empty(SITES, "site"), absolute(step_size=1e39))


def zero_turn() -> dict[str, Rows]:
    return {name: Rows(rows.keys, torch.zeros_like(rows.gradients)) for name, rows in turn(4, 0).items()}


@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
def test_a_zero_update_is_refused_unless_the_edits_are_satisfied(normalization: str) -> None:
    settings = absolute(normalization)  # type: ignore[arg-type]
    with pytest.raises(BadTurn, match="exactly zero at every site"):
        plan_turn(zero_turn(), LNStatistics.empty(SITES, "site"), settings)
    plan = plan_turn(zero_turn(), LNStatistics.empty(SITES, "site"), settings, satisfied=True)
    assert all(update.norm().item() == 0.0 for update in plan.updates.values())


def test_one_site_without_an_update_is_no_error() -> None:
    rows = turn(4, 0) | {"a": zero_turn()["a"]}
    plan = plan_turn(rows, LNStatistics.empty(SITES, "site"), absolute())
    assert plan.updates["a"].norm().item() == 0.0 and plan.updates["b"].norm().item() > 0


def test_bad_turns_are_arithmetic_errors_and_plans_cannot_be_changed() -> None:
    assert issubclass(BadTurn, ArithmeticError)
    plan = plan_turn(turn(4, 0), LNStatistics.empty(SITES, "site"), absolute())
    with pytest.raises(AttributeError):
        plan.updates = {}  # type: ignore[misc]
    assert isinstance(plan, TurnPlan)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("normalization", "whitening", "normalization must be one of whiten, standardize, none, got 'whitening'"),
        ("step_size", 0.0, "step_size must be positive, got 0.0"),
        ("step_size", -1e-6, "step_size must be positive, got -1e-06"),
        ("step_size", float("nan"), "step_size must be positive, got nan"),
        ("ridge", 0, "ridge must be positive, got 0"),
        ("ridge", -1.0, "ridge must be positive, got -1.0"),
        ("relative_step", 0.0, "relative_step must be positive, got 0.0"),
        ("relative_ridge", float("inf"), "relative_ridge must be positive, got inf"),
        ("passes", 0, "passes must be at least 1, got 0"),
        ("enough_margin", 0.0, "enough_margin must be above 0 and at most 1, got 0.0"),
        ("enough_margin", 1.5, "enough_margin must be above 0 and at most 1, got 1.5"),
        ("prior_strength", -0.5, "prior_strength must be zero or positive, got -0.5"),
        ("eigenvalue_floor", -1e-9, "eigenvalue_floor must be zero or positive, got -1e-09"),
        ("eigenvalue_floor", float("nan"), "eigenvalue_floor must be zero or positive, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        MethodSettings(**{setting: value})  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_two_forms_of_one_setting_are_refused() -> None:
    with pytest.raises(SettingError, match=r"both step_size=0.1 and relative_step=0.3 are given, two forms of one"):
        MethodSettings(step_size=0.1, relative_step=0.3)
    with pytest.raises(SettingError, match=r"both ridge=2 and relative_ridge=0.1 are given.*set one of them to null"):
        MethodSettings(ridge=2, relative_ridge=0.1)
    mixed = MethodSettings(ridge=2.0)
    assert mixed.relative_step == 0.1 and mixed.relative_ridge is None and mixed.relative


def test_the_defaults_are_the_designs() -> None:
    relative = {"relative_step": 0.1, "relative_ridge": 0.01}
    assert MethodSettings() == MethodSettings("whiten", None, None, 1.0, 0.0, "auto", **relative, passes=1)
    assert MethodSettings(prior_strength=0, eigenvalue_floor=0)


def test_a_system_that_cannot_be_solved_is_a_bad_turn() -> None:
    """Finite keys whose Gram matrix overflows float32: bad numbers of a turn like any other, or solved in float64."""
    rows = {"a": Rows(torch.full((3, 6), 1e19), turn(3, 0)["a"].gradients)}
    try:
        plan_turn(rows, LNStatistics.empty(SITES[:1], "site"), absolute("none"))
    except BadTurn:
        return


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"prior_strength": 0.0}, "needs a positive prior_strength and eigenvalue_floor 0, got 0.0 and 0.0"),
        ({"eigenvalue_floor": 1e-6}, "needs a positive prior_strength and eigenvalue_floor 0, got 1.0 and 1e-06"),
    ],
)
def test_quadrature_where_it_cannot_be_is_refused_only_if_it_was_named(others: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=f"whitening_solver quadrature {message}; use auto or eigh"):
        MethodSettings(**others, whitening_solver="quadrature")  # type: ignore[arg-type]
    for solver in ("auto", "eigh"):
        MethodSettings(**others, whitening_solver=solver)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="whitening_solver must be one of auto, eigh, quadrature, got 'lanczos'"):
        MethodSettings(whitening_solver="lanczos")  # type: ignore[arg-type]


def test_the_solver_is_no_part_of_what_a_method_is() -> None:
    assert MethodSettings(whitening_solver="eigh").identity() == MethodSettings().identity()
    assert MethodSettings(ridge=2.0).identity() != MethodSettings().identity()
    names = ("normalization", "step_size", "ridge", "prior_strength", "eigenvalue_floor")
    names += ("relative_step", "relative_ridge", "passes", "enough_margin")
    assert tuple(MethodSettings().identity()) == names


def test_a_plan_tells_its_norms() -> None:
    plan = plan_turn(turn(4, 0), LNStatistics.empty(SITES, "site"), absolute(step_size=0.1))
    assert plan.norms == {name: pytest.approx(update.norm().item()) for name, update in plan.updates.items()}
    assert all(norm > 0 for norm in plan.norms.values())
