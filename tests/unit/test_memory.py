"""The formula of docs/memory.md against what the allocator hands out."""

from typing import Any

import pytest
import torch
from allocations import peak_bytes
from tiny import absolute
from torch import nn
from transformers.pytorch_utils import Conv1D

from stableedit_pl.devices.memory import planned_bytes
from stableedit_pl.method import workspace
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics, Rows
from stableedit_pl.model.capture import Captured
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.sites import Site

GIB = 2**30


def peak_of_turns(sites: list[Site], rows: int, scope: Any, settings: MethodSettings, turns: int = 2) -> int:
    """Peak bytes beyond the model over whole turns: with masters, statistics and rows."""

    def again() -> Captured:
        captured = {site.name: Rows(torch.randn(rows, site.d_in), torch.randn(rows, site.d_out)) for site in sites}
        return Captured(captured, torch.tensor([[1.0], [0.0]]), margins=torch.full((rows, 1), -1.0))

    def run() -> Any:
        for site in sites:
            site.use_master("cpu")
        state = EditorState(LNStatistics.empty(sites, scope))
        given: list[StepInput] = []
        optimizer = ClosedFormEdit(sites, state, given.pop)
        for _ in range(turns):
            captured = {site.name: Rows(torch.randn(rows, site.d_in), torch.randn(rows, site.d_out)) for site in sites}
            given.append(StepInput(Captured(captured, torch.tensor([[1.0], [0.0]])), settings, True, again))
            del captured
            optimizer.step(lambda: torch.tensor(1.0))
        assert state.committed_turns == turns
        return optimizer

    return peak_bytes(run)


def linear_sites(count: int, d_in: int, d_out: int, dtype: torch.dtype) -> list[Site]:
    return [Site(f"site{i}", nn.Linear(d_in, d_out, dtype=dtype)) for i in range(count)]


@pytest.mark.parametrize("solver", ["eigh", "quadrature"])
@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize(
    ("count", "d_in", "d_out", "rows", "dtype"),
    [
        (3, 896, 256, 20, torch.bfloat16),  # the proportions of an 8B model's down_proj and of 300 rows
        (3, 896, 256, 20, torch.float32),
        (1, 896, 256, 20, torch.bfloat16),
        (4, 128, 448, 30, torch.bfloat16),
        (2, 64, 256, 200, torch.bfloat16),  # the primal form
        (2, 512, 64, 300, torch.float32),  # rows outweigh everything
    ],
)
def test_the_formula_bounds_the_peak_and_is_not_far_above_it(
    count: int, d_in: int, d_out: int, rows: int, dtype: torch.dtype, scope: Any, solver: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(workspace, "BLOCK_BYTES", 2**16)
    settings = absolute(step_size=1e-3, whitening_solver=solver)
    peak = peak_of_turns(linear_sites(count, d_in, d_out, dtype), rows, scope, settings)
    planned = planned_bytes([(d_in, d_out)] * count, rows, dtype == torch.bfloat16, scope, solver)
    assert peak <= planned.total <= 1.5 * peak, (peak / planned.total, planned)


@pytest.mark.parametrize("passes", [2, 5])
@pytest.mark.parametrize("solver", ["eigh", "quadrature"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("d_in", "d_out", "rows"), [(896, 256, 20), (64, 256, 200)])
def test_the_formula_holds_for_several_passes(
    d_in: int, d_out: int, rows: int, dtype: torch.dtype, solver: Any, passes: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(workspace, "BLOCK_BYTES", 2**16)
    settings = absolute(step_size=1e-3, whitening_solver=solver, passes=passes)
    peak = peak_of_turns(linear_sites(3, d_in, d_out, dtype), rows, "site", settings)
    planned = planned_bytes([(d_in, d_out)] * 3, rows, dtype == torch.bfloat16, "site", solver, passes)
    assert peak <= planned.total <= 1.5 * peak, (peak / planned.total, planned)


@pytest.mark.parametrize("normalization", ["standardize", "none"])
def test_methods_without_whitening_need_less(normalization: Any) -> None:
    peak = peak_of_turns(linear_sites(2, 300, 200, torch.bfloat16), 20, "site", absolute(normalization))
    planned = planned_bytes([(300, 200)] * 2, 20, solver=None)
    assert peak <= planned.total <= 1.5 * peak, (peak / planned.total, planned)
    assert planned.total < planned_bytes([(300, 200)] * 2, 20).total


def test_sites_of_several_shapes_and_layouts() -> None:
    sites = [Site("a", nn.Linear(300, 100).bfloat16()), Site("b", Conv1D(200, 150).bfloat16())]
    peak = peak_of_turns(sites, 20, "site", absolute(whitening_solver="quadrature"))
    planned = planned_bytes([(300, 100), (150, 200)], 20)
    assert peak <= planned.total <= 1.5 * peak, (peak / planned.total, planned)


def test_no_dense_update_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 40 sites of 512 x 64 and four rows, one dense float32 update of all would be more than the whole peak."""
    monkeypatch.setattr(workspace, "BLOCK_BYTES", 2**14)
    sites = linear_sites(40, 512, 64, torch.float32)
    peak = peak_of_turns(sites, 4, "shape", absolute(whitening_solver="quadrature"))
    assert peak < 40 * 512 * 64 * 4 / 2


def test_memory_does_not_grow_with_turns() -> None:
    def peak(turns: int) -> int:
        return peak_of_turns(linear_sites(2, 100, 50, torch.bfloat16), 5, "site", absolute(), turns)

    assert peak(8) == peak(3)


def test_an_eight_billion_model_is_edited_in_four_gibibytes() -> None:
    """Llama 3 8B, seven down_proj, 100 edits of three answer tokens; the figures in docs/memory.md."""
    down_proj = [(14336, 4096)] * 7
    planned = planned_bytes(down_proj, rows=300)
    assert planned.total <= 4 * GIB
    assert planned.total / GIB == pytest.approx(3.24, abs=0.005)
    assert planned_bytes(down_proj, rows=300, scope="shape").total / GIB == pytest.approx(3.00, abs=0.005)


def test_the_allocator_is_heard() -> None:
    """Positive control: sizes, and that freed memory counts only while it is held."""
    assert peak_bytes(lambda: [torch.empty(1000) for _ in range(3)]) == pytest.approx(12000, abs=200)
    assert peak_bytes(lambda: [torch.empty(1000).numel() for _ in range(3)]) == pytest.approx(4000, abs=200)
