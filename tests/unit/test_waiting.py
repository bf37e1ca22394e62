"""The host waits for the device once in a turn's algebra: when the finished draft is read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import absolute
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from stableedit_pl.method import planning
from stableedit_pl.method.planning import BadTurn, draft_turn, read_tensors
from stableedit_pl.method.problem import Problem, Solution, solve_all
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics, Rows, moved
from stableedit_pl.model.capture import Captured
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.sites import Site

WAITS = ["tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"]


class ScalarReads(TorchDispatchMode):
    """Counts what torch itself reads on the way, inside functions that no patch of a method sees."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Every way in which Python asks a tensor for its numbers."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            real = getattr(Tensor, name)

            def spy(self: Tensor, *args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                seen.append(_name)
                return _real(self, *args, **kwargs)

            patch.setattr(Tensor, name, spy)
        mode = ScalarReads()
        with mode:
            yield seen
    assert mode.reads == sum(name in ("item", "__bool__", "__float__", "__int__") for name in seen)


def some_sites(dtype: torch.dtype = torch.float32) -> list[Site]:
    torch.manual_seed(0)
    modules = [nn.Linear(8, 4), Conv1D(6, 5), nn.Linear(8, 4)]
    return [Site(name, module.to(dtype)) for name, module in zip("abc", modules, strict=True)]


def some_rows(sites: list[Site], device: str = "cpu") -> dict[str, Rows]:
    return {
        site.name: Rows(torch.randn(3, site.d_in, device=device), torch.randn(3, site.d_out, device=device))
        for site in sites
    }


MEASURED = torch.tensor([[1.0], [0.0]])

METHODS = [
    absolute("whiten", whitening_solver="quadrature"),
    absolute("whiten", whitening_solver="eigh", eigenvalue_floor=1e-3),
    absolute("whiten", prior_strength=0.0),
    absolute("standardize"),
    absolute("none"),
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s.normalization}-{s.whitening_solver}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize("update_weights", [True, False])
def test_a_step_reads_its_numbers_once(
    settings: MethodSettings, dtype: torch.dtype, scope: Any, update_weights: bool
) -> None:
    sites = some_sites(dtype)
    for site in sites:
        site.use_master("cpu")
    given = [
        StepInput(Captured(some_rows(sites), torch.tensor([[1.0], [0.0]])), absolute("none", step_size=1e-3), True),
        StepInput(Captured(some_rows(sites), MEASURED), settings, update_weights),
    ]
    optimizer = ClosedFormEdit(sites, EditorState(LNStatistics.empty(sites, scope)), lambda: given.pop(0))
    optimizer.max_update_norm = 1e9
    optimizer.editor_state.update_norms = [1.0] * 10
    optimizer.step(lambda: None)
    with counted_waits() as seen:
        optimizer.step(lambda: None)
    assert seen == ["tolist"] and optimizer.editor_state.committed_turns == 2


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s.normalization}-{s.whitening_solver}")
@pytest.mark.parametrize("rows", [3, 20])
def test_a_draft_and_its_commit_need_no_numbers_at_all(settings: MethodSettings, rows: int) -> None:
    """On the meta device there are none: whatever looked at one would fail."""
    sites = some_sites()
    for site in sites:
        site.module.to("meta")
    devices = {site.name: torch.device("meta") for site in sites}
    statistics = LNStatistics.empty(sites, "shape", devices).updated(some_rows(sites, "meta"))
    captured = {
        site.name: Rows(torch.randn(rows, site.d_in, device="meta"), torch.randn(rows, site.d_out, device="meta"))
        for site in sites
    }
    draft = draft_turn(captured, statistics, settings)
    assert draft.updates.keys() == draft.norms.keys() == {"a", "b", "c"}
    optimizer = ClosedFormEdit(sites, EditorState(statistics), lambda: None)  # type: ignore[arg-type, return-value]
    for site, update, workspace in optimizer._prepared(draft.updates):
        assert site.stays_in_range(update, workspace).device.type == "meta"
        site.add(update, workspace)
    with pytest.raises(RuntimeError, match="meta"):
        draft.read()  # negative control: this is what a look at the numbers does


def test_sites_on_several_devices_are_queued_before_the_host_begins() -> None:
    """Accelerators (here ``meta``, where a look at a number fails) get their work first; the host's is the same."""
    sites = some_sites()
    rows = some_rows(sites)
    expected = draft_turn(rows, LNStatistics.empty(sites, "site"), absolute())
    placed = LNStatistics.empty(sites, "site", {"b": torch.device("meta")})
    order: list[str] = []

    def solve(problems: Sequence[Problem]) -> Mapping[str, Solution]:
        order.extend(name for problem in problems for name in problem.rows)
        return solve_all(problems)

    draft = draft_turn(rows, placed, absolute(), solve=solve)
    assert order == ["b", "a", "c"] and list(draft.updates) == ["a", "b", "c"] == list(draft.norms)
    assert draft.norms["b"].device.type == "meta" and draft.updates["b"].right.device.type == "meta"
    for name in ("a", "c"):
        assert torch.equal(draft.updates[name].right, expected.updates[name].right)


def test_only_what_goes_to_an_accelerator_goes_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the host that did not wait could be read before it has come."""
    asked: list[tuple[str, bool]] = []

    def to(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        asked.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "to", to)
    moved(torch.ones(1), torch.device("cuda", 1))
    moved(torch.ones(1), torch.device("cpu"))
    assert asked == [("cuda", True), ("cpu", False)]


def test_a_look_at_a_number_is_counted() -> None:
    """Negative control of the counter."""
    x = torch.ones(2)
    with counted_waits() as seen:
        assert x.sum() > 1
        float(x[0])
        x.tolist()
    assert seen.count("tolist") == 1 and len(seen) >= 3


def test_reading_keeps_the_order_and_transfers_once_for_each_device() -> None:
    values = [torch.tensor(True), torch.tensor([[2.5], [1.5]]).double(), torch.tensor(3, dtype=torch.int32)]
    with counted_waits() as seen:
        assert read_tensors(values) == [[1.0], [2.5, 1.5], [3.0]]
    assert seen == ["tolist"] and read_tensors([]) == []


def test_the_most_important_fault_is_told() -> None:
    """One bad row spoils moments and updates as well; what is said is where it began."""
    sites = some_sites()
    rows = some_rows(sites)
    rows["b"].keys[0, 0] = float("nan")
    wrong, plan, _ = draft_turn(rows, LNStatistics.empty(sites, "site"), absolute()).read()
    assert wrong[0] == "keys or value gradients of site b are not finite"
    assert wrong[1] == "the LN statistics would not be finite after this turn"
    assert any("ridge system is not positive definite" in message for message in wrong[2:])
    assert set(plan.norms) == {"a", "b", "c"}
    with pytest.raises(BadTurn, match="site b are not finite"):
        planning.plan_turn(rows, LNStatistics.empty(sites, "site"), absolute())
