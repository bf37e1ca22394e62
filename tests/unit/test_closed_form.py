"""One step: capture, plan, commit; all of it or nothing."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from tiny import absolute, relative_difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stableedit_pl.method import problem as problem_module
from stableedit_pl.method import workspace
from stableedit_pl.method.planning import BadTurn, TurnPlan, plan_turn
from stableedit_pl.method.ridge import SiteUpdate, ridge_update
from stableedit_pl.method.scales import Scale
from stableedit_pl.method.statistics import LNStatistics, Rows
from stableedit_pl.method.workspace import Workspace
from stableedit_pl.model import closed_form
from stableedit_pl.model.capture import Captured
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.sites import Site

SETTINGS = absolute(step_size=0.01, ridge=2.0)


class Bench:
    """Two sites, an editor state, and an optimizer that is fed by hand."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.sites = [Site("a", nn.Linear(6, 4).to(dtype)), Site("b", Conv1D(3, 5).to(dtype))]
        self.state = EditorState(LNStatistics.empty(self.sites, "site"))
        self.next = self.turn(0)
        self.optimizer = ClosedFormEdit(self.sites, self.state, lambda: self.next)

    def turn(self, seed: int, update_weights: bool = True, correct: float = 0.0, scale: float = 1.0) -> StepInput:
        generator = torch.Generator().manual_seed(seed)
        rows = {
            site.name: Rows(
                torch.randn(3, site.d_in, generator=generator), torch.randn(3, site.d_out, generator=generator) * scale
            )
            for site in self.sites
        }
        return StepInput(Captured(rows, torch.tensor([[1.0, 2.0, 3.0], [correct] * 3])), SETTINGS, update_weights)

    def step(self, given: StepInput | None = None) -> Any:
        self.next = given or self.next
        return self.optimizer.step(lambda: torch.tensor(1.5))

    def snapshot(self) -> tuple[list[Tensor], dict[str, Tensor], int]:
        statistics = {name: tensor.clone() for name, tensor in self.state.statistics.tensors().items()}
        return [site.state.clone() for site in self.sites], statistics, self.state.committed_turns

    def unchanged_since(self, snapshot: tuple[list[Tensor], dict[str, Tensor], int]) -> bool:
        weights, statistics, turns = snapshot
        now = self.snapshot()
        return (
            all(torch.equal(a, b) for a, b in zip(weights, now[0], strict=True))
            and all(torch.equal(tensor, now[1][name]) for name, tensor in statistics.items())
            and turns == now[2]
        )


def test_a_step_commits_weights_statistics_and_counter_together() -> None:
    bench = Bench()
    weights, _, _ = bench.snapshot()
    plan = plan_turn(bench.next.captured.rows, bench.state.statistics, SETTINGS)
    loss = bench.step()
    assert loss.item() == 1.5
    for site, before in zip(bench.sites, weights, strict=True):
        update = plan.updates[site.name]
        exact = before.double() + site.oriented(update.left.double().T @ update.right)
        assert torch.equal(site.weight, exact.float())  # rounded once
        assert not torch.equal(site.weight, before)
    assert bench.state.committed_turns == 1 and not bench.state.committing
    assert bench.state.statistics.gradients["a"].count == 3
    assert bench.optimizer.last is not None
    assert torch.equal(bench.optimizer.last.plan.updates["a"].right, plan.updates["a"].right)
    assert bench.optimizer.last.seconds.keys() == {"plan", "commit"}
    assert bench.optimizer.last.survived == {}


def test_turns_add_up() -> None:
    bench = Bench()
    weights, _, _ = bench.snapshot()
    total = torch.zeros(6, 4)
    for seed in range(4):
        bench.step(bench.turn(seed))
        assert bench.optimizer.last is not None
        total += bench.optimizer.last.plan.updates["a"].dense()
    assert bench.state.committed_turns == 4 and bench.state.statistics.keys["b"].count == 12
    assert relative_difference(bench.sites[0].weight - weights[0], total.T) < 1e-5


def test_a_statistics_only_turn_is_a_turn_that_leaves_the_weights() -> None:
    bench = Bench()
    weights, _, _ = bench.snapshot()
    bench.step(bench.turn(0, update_weights=False))
    assert all(torch.equal(site.weight, before) for site, before in zip(bench.sites, weights, strict=True))
    assert bench.state.committed_turns == 1 and bench.state.statistics.gradients["b"].count == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("site", ["a", "b"])
@pytest.mark.parametrize("part", ["keys", "gradients"])
def test_a_bad_number_leaves_everything_as_it_was(value: float, site: str, part: str) -> None:
    bench = Bench()
    bench.step()
    last, snapshot = bench.optimizer.last, bench.snapshot()
    bad = bench.turn(1)
    getattr(bad.captured.rows[site], part)[0, 0] = value
    with pytest.raises(BadTurn, match=f"site {site}"):
        bench.step(bad)
    assert bench.unchanged_since(snapshot) and not bench.state.committing and bench.optimizer.last is last
    bench.step(bench.turn(1))
    other = Bench()
    other.step()
    other.step(other.turn(1))
    assert other.unchanged_since(bench.snapshot())  # a turn taken again after a failure is the turn


def test_a_zero_update_is_refused_unless_every_edit_is_known() -> None:
    bench = Bench()
    snapshot = bench.snapshot()
    with pytest.raises(BadTurn, match="exactly zero"):
        bench.step(bench.turn(0, scale=0.0))
    assert bench.unchanged_since(snapshot)
    half_known = bench.turn(0, scale=0.0)
    half_known.captured.correct[:] = [1.0, 1.0, 0.5]
    with pytest.raises(BadTurn, match="exactly zero"):
        bench.step(half_known)
    assert bench.unchanged_since(snapshot)
    bench.step(bench.turn(0, scale=0.0, correct=1.0))
    assert bench.state.committed_turns == 1


@pytest.mark.parametrize("where", ["closure", "take_input", "plan", "read", "workspace"])
def test_an_exception_before_the_commit_leaves_everything_as_it_was(where: str, monkeypatch: Any) -> None:
    bench = Bench()
    bench.step()
    snapshot = bench.snapshot()

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise MemoryError(where)

    if where == "take_input":
        bench.optimizer.take_input = fail
    elif where == "plan":
        monkeypatch.setattr(closed_form, "draft_turn", fail)
    elif where == "read":
        monkeypatch.setattr("stableedit_pl.method.planning.TurnDraft.read", fail)
    elif where == "workspace":
        monkeypatch.setattr(closed_form, "Workspace", fail)
    with pytest.raises(MemoryError):
        bench.optimizer.step(fail if where == "closure" else lambda: torch.tensor(1.0))
    assert bench.unchanged_since(snapshot) and not bench.state.committing


def test_committing_is_true_exactly_while_a_commit_writes(monkeypatch: Any) -> None:
    bench = Bench()
    seen: list[tuple[bool, int]] = []
    add = Site.add
    monkeypatch.setattr(
        Site,
        "add",
        lambda self, *a: (seen.append((bench.state.committing, bench.state.committed_turns)), add(self, *a))[1],
    )
    during_closure = []
    bench.optimizer.step(lambda: (during_closure.append(bench.state.committing), torch.tensor(1.0))[1])
    assert seen == [(True, 0), (True, 0)] and during_closure == [False] and not bench.state.committing


def test_a_failure_in_the_middle_of_a_commit_stays_marked(monkeypatch: Any) -> None:
    """Half a turn is written: the flag must stay up, so that nothing saves this state."""
    bench = Bench()
    add = Site.add

    def fail_at_b(self: Site, *args: Any) -> None:
        if self.name == "b":
            raise MemoryError
        add(self, *args)

    monkeypatch.setattr(Site, "add", fail_at_b)
    with pytest.raises(MemoryError):
        bench.step()
    assert bench.state.committing and bench.state.committed_turns == 0


def test_gradients_are_enabled_in_the_closure_and_only_there() -> None:
    bench = Bench()
    enabled = []
    with torch.no_grad():
        bench.optimizer.step(lambda: (enabled.append(torch.is_grad_enabled()), torch.tensor(1.0))[1])
    assert enabled == [True]


def test_a_step_without_a_closure_is_refused() -> None:
    bench = Bench()
    snapshot = bench.snapshot()
    with pytest.raises(RuntimeError, match="needs the closure"):
        bench.optimizer.step()
    assert bench.unchanged_since(snapshot)


def test_the_optimizer_holds_the_sites_weights_and_no_state() -> None:
    bench = Bench()
    (group,) = bench.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(site.module.weight) for site in bench.sites]
    bench.step()
    assert bench.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_survival_is_what_the_dtype_kept(dtype: torch.dtype, master: bool) -> None:
    bench = Bench(dtype)
    if master:
        for site in bench.sites:
            site.use_master("cpu")
    before = [site.weight.clone() for site in bench.sites]
    bench.optimizer.measure_survival = True
    bench.step(bench.turn(0))
    assert bench.optimizer.last is not None
    survived = bench.optimizer.last.survived
    assert survived.keys() == {"a", "b"}
    for site, old in zip(bench.sites, before, strict=True):
        wanted = site.oriented(bench.optimizer.last.plan.updates[site.name].dense()).double()
        applied = site.weight.double() - old.double()
        assert survived[site.name] == pytest.approx(((applied * wanted).sum() / wanted.square().sum()).item())
    if dtype == torch.float32:
        assert all(value == pytest.approx(1.0, abs=1e-4) for value in survived.values())


def test_survival_shows_updates_that_vanish() -> None:
    bench = Bench(torch.bfloat16)
    with torch.no_grad():
        for site in bench.sites:
            site.module.weight.fill_(100.0)
    bench.optimizer.measure_survival = True
    bench.step(StepInput(bench.turn(0).captured, absolute(step_size=1e-6), True))
    assert bench.optimizer.last is not None and set(bench.optimizer.last.survived.values()) == {0.0}


def test_survival_of_a_statistics_only_turn_is_empty() -> None:
    bench = Bench()
    bench.optimizer.measure_survival = True
    bench.step(bench.turn(0, update_weights=False))
    assert bench.optimizer.last is not None and bench.optimizer.last.survived == {}


def test_a_weight_that_overflows_its_dtype_is_a_bad_turn() -> None:
    bench = Bench(torch.float16)
    with torch.no_grad():
        bench.sites[0].module.weight.fill_(65504.0)
    snapshot = bench.snapshot()
    with pytest.raises(BadTurn):
        bench.step(StepInput(bench.turn(0).captured, absolute("none", step_size=1e4), True))
    assert bench.unchanged_since(snapshot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 2**26])
def test_a_commit_allocates_nothing(dtype: torch.dtype, block: int, monkeypatch: Any) -> None:
    """Weights are written in memory that was there before the first of them: running out of it leaves no half turn."""
    monkeypatch.setattr(workspace, "BLOCK_BYTES", block)
    torch.manual_seed(0)
    sites = [Site("a", nn.Linear(64, 48).to(dtype)), Site("b", Conv1D(32, 80).to(dtype))]
    for site in sites:
        site.use_master("cpu")
    optimizer = ClosedFormEdit(sites, EditorState(LNStatistics.empty(sites, "site")), lambda: None)  # type: ignore
    updates = {
        site.name: SiteUpdate(torch.randn(3, site.d_in), torch.randn(3, site.d_out, dtype=torch.float64))
        for site in sites
    }
    prepared = optimizer._prepared(updates)
    plan = TurnPlan(optimizer.editor_state.statistics, updates, dict.fromkeys(updates, 1.0))
    before = [site.weight.clone() for site in sites]
    # Kernels take a fixed area of their own; a block of either site would be at least three times as much.
    assert peak_bytes(lambda: optimizer._commit(plan, prepared, None)) < 4096
    assert all(not torch.equal(site.weight, old) for site, old in zip(sites, before, strict=True))


def test_the_solver_is_logged_once_for_each_shape_and_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with caplog.at_level(logging.INFO):
        bench.step(bench.turn(0, update_weights=False))
        bench.step(bench.turn(1))
        bench.step(bench.turn(2))
        bench.step(replace(bench.turn(3), settings=replace(SETTINGS, whitening_solver="quadrature")))
    assert [record.getMessage() for record in caplog.records] == [
        f"Value gradients of {shape} sites are whitened by {solver}"
        for solver in ("eigh", "quadrature")
        for shape in ("6 x 4", "5 x 3")
    ]


def test_a_loss_that_is_not_finite_is_told_before_what_follows_from_it() -> None:
    bench = Bench()
    snapshot = bench.snapshot()
    bad = bench.turn(0)
    bad.captured.measured[0, 1] = float("nan")
    bad.captured.rows["a"].gradients.fill_(float("nan"))
    with pytest.raises(BadTurn, match="the loss of the turn's edits is not finite"):
        bench.step(bad)
    assert bench.unchanged_since(snapshot)


@pytest.mark.parametrize("master", [True, False])
def test_the_last_weight_in_range_is_not_refused(master: bool) -> None:
    """float16 ends at 65504; what rounds to it is in range, what rounds to 65536 is not."""
    for size, fits in ((15.9, True), (16.0, False)):
        site = Site("a", nn.Linear(1, 1).half())
        with torch.no_grad():
            site.module.weight.fill_(65504.0)
        if master:
            site.use_master("cpu")
        update = SiteUpdate(torch.ones(1, 1), torch.full((1, 1), size, dtype=torch.float64))
        scratch = Workspace(torch.device("cpu"), 2, 1)
        assert bool(site.stays_in_range(update, scratch)) is fits
        site.add(update, scratch)
        assert bool(torch.isfinite(site.weight).all()) is fits


def test_callbacks_see_the_step_size_as_learning_rate_also_after_an_older_checkpoint() -> None:
    bench = Bench()
    optimizer = ClosedFormEdit(bench.sites, bench.state, lambda: bench.next, lr=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["lr"]
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


# ---- passes


def passes_of(bench: Bench, margins: list[list[float]], passes: int) -> tuple[StepInput, list[list[Tensor]]]:
    """A turn whose further passes find these margins, and the weights that each of them saw."""
    seen: list[list[Tensor]] = []

    def again() -> Captured:
        seen.append([site.weight.clone() for site in bench.sites])
        found = bench.turn(len(seen)).captured
        found.margins = torch.tensor(margins[len(seen) - 1]).unsqueeze(1)
        return found

    settings = replace(SETTINGS, passes=passes, enough_margin=0.5)
    return replace(bench.turn(0), settings=settings, again=again), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_passes_are_one_plan_of_which_each_saw_those_before(dtype: torch.dtype) -> None:
    bench = Bench(dtype)
    for site in bench.sites:
        site.use_master("cpu")
    states = [site.state.double() for site in bench.sites]
    given, seen = passes_of(bench, [[-1.0, 0.0, 0.45]] * 3, 4)
    bench.step(given)
    assert len(seen) == 3 and bench.state.committed_turns == 1
    assert bench.state.statistics.gradients["a"].count == 3, "the turn's rows count once"
    statistics = bench.state.statistics
    total = plan_turn(given.captured.rows, LNStatistics.empty(bench.sites, "site"), SETTINGS).updates
    sums = {name: update.left.double().T @ update.right for name, update in total.items()}
    left = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    for number, weights in enumerate(seen, start=1):
        for site, weight, state in zip(bench.sites, weights, states, strict=True):
            assert relative_difference(weight, (state + site.oriented(sums[site.name])).to(dtype)) < 1e-6
            rows = bench.turn(number).captured.rows[site.name]
            problem = problem_module.Problem(
                {site.name: rows},
                statistics.keys[site.name],
                statistics.gradients[site.name],
                SETTINGS,
                Scale(0.01, 2.0),
            )
            values = problem._targets([rows])[0] * left.float().unsqueeze(1)
            update, _ = ridge_update(rows.keys, values, 2.0)
            sums[site.name] = sums[site.name] + update.left.double().T @ update.right
    for site, state in zip(bench.sites, states, strict=True):
        assert relative_difference(site.state, state + site.oriented(sums[site.name])) < 1e-6
    assert bench.optimizer.last is not None
    assert [record.token_match for record in bench.optimizer.last.passes] == [0.0] * 4
    assert len(bench.optimizer.last.plan.updates["a"].left) == 4 * 3, "in factors"


def test_a_turn_ends_when_every_answer_token_is_far_enough_ahead() -> None:
    bench, capped = Bench(), Bench()
    given, seen = passes_of(bench, [[-1.0, 0.9, 0.9], [0.39, 0.9, 0.5], [0.5, 0.51, 0.9]], 9)
    bench.step(given)
    assert len(seen) == 3 and bench.optimizer.last is not None and len(bench.optimizer.last.passes) == 3
    shorter, _ = passes_of(capped, [[-1.0, 0.9, 0.9], [0.39, 0.9, 0.5]], 3)
    capped.step(shorter)
    assert bench.unchanged_since(capped.snapshot())
    other = Bench()
    close, seen = passes_of(other, [[0.4999, 0.5, 0.5]] * 2, 3)
    other.step(close)
    assert len(seen) == 2, "nothing jumps: what is left shrinks to nothing before a turn ends"


@pytest.mark.parametrize("kind", ["gradient", "failure"])
def test_what_goes_wrong_in_a_later_pass_leaves_everything_as_it_was(kind: str) -> None:
    bench = Bench()
    given, seen = passes_of(bench, [[-1.0] * 3] * 4, 4)
    working = given.again
    assert working is not None

    def again() -> Captured:
        found = working()
        if len(seen) == 3:
            if kind == "failure":
                raise RuntimeError("the device is lost")
            found.rows["b"].gradients[0, 0] = float("nan")
        return found

    before = bench.snapshot()
    errors = {"gradient": "site b are not finite in a further pass", "failure": "lost"}
    with pytest.raises((BadTurn, RuntimeError), match=errors[kind]):
        bench.step(replace(given, again=again))
    assert bench.unchanged_since(before) and not bench.state.committing and len(seen) == 3
