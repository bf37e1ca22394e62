"""Whole runs of the package against the slow float64 reference."""

from pathlib import Path

import pytest
import reference as ref
import torch
from edit_runs import fit, updates
from tiny import (
    GPT2_SITE,
    LLAMA_SITE,
    edit_rows,
    relative_difference,
    tiny_gpt2,
    tiny_llama,
    word_tokenizer,
    write_stream,
)

from stableedit_pl.callbacks import WarmUp

TURN = 6
ROWS = edit_rows(22 * TURN + 2)  # 22 full turns and one of two edits
WARMUP = edit_rows(3 * TURN, seed=5)
LLAMA_SITES = ["model.layers.0.mlp.down_proj", LLAMA_SITE]


def turns(rows: list[dict]) -> list[list[tuple[str, str]]]:
    pairs = [(row["prompt"], row["target"]) for row in rows]
    return [pairs[i : i + TURN] for i in range(0, len(pairs), TURN)]


@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
def test_default_mode_equals_reference_over_23_turns(tmp_path: Path, llama_folder: str, normalization: str) -> None:
    step = {"whiten": 2e-3, "standardize": 2e-3, "none": 3e-1}[normalization]
    stream = write_stream(tmp_path / "edits.jsonl", ROWS)
    editor = fit(
        tmp_path / "run",
        llama_folder,
        {"path": stream, "turn_size": TURN},
        {"sites": LLAMA_SITES, "normalization": normalization, "step_size": step, "passes": 1},
    )
    expected = ref.reference_run(
        tiny_llama(), word_tokenizer(), LLAMA_SITES, turns(ROWS), normalization=normalization, step_size=step, ridge=1.0
    )
    assert len(expected.turns) == 23
    for name, update in updates(editor).items():
        assert expected.accumulated[name].norm() > 0.05 * editor.sites[0].original.norm()
        assert relative_difference(update, expected.accumulated[name]) < 1e-4


def test_parity_mode_equals_reference_with_warm_up(tmp_path: Path, llama_folder: str) -> None:
    stream = write_stream(tmp_path / "edits.jsonl", ROWS)
    warmup = write_stream(tmp_path / "warmup.jsonl", WARMUP)
    method = {"step_size": 1e-3, "ridge": 1.0, "prior_strength": 0.0, "eigenvalue_floor": 1e-6}
    parity = {"loss_reduction": "micro_batch_mean", "statistics_scope": "shape"}
    editor = fit(
        tmp_path / "run",
        llama_folder,
        {
            "path": stream,
            "warmup_path": warmup,
            "turn_size": TURN,
            "micro_batch_size": 4,
            "edit_order": "longest_first",
            "count_bare_space": True,
        },
        {"sites": LLAMA_SITES, "master_dtype": "model", "passes": 1, **method, **parity},
        callbacks=[WarmUp(normalization="standardize")],
    )
    expected = ref.reference_run(
        tiny_llama(),
        word_tokenizer(),
        LLAMA_SITES,
        turns(ROWS),
        **method,
        **parity,
        micro_batch_size=4,
        sort_edits_by_length=True,
        skip_bare_space=False,
        warmup_turns=turns(WARMUP),
        warmup_normalization="standardize",
    )
    assert len(expected.turns) == 26
    for name, update in updates(editor).items():
        assert relative_difference(update, expected.accumulated[name]) < 1e-4


def test_statistics_only_warm_up_equals_reference_on_gpt2(tmp_path: Path, gpt2_folder: str) -> None:
    stream = write_stream(tmp_path / "edits.jsonl", ROWS[:30])
    warmup = write_stream(tmp_path / "warmup.jsonl", WARMUP)
    editor = fit(
        tmp_path / "run",
        gpt2_folder,
        {"path": stream, "warmup_path": warmup, "turn_size": TURN},
        {"sites": [GPT2_SITE], "passes": 1},
        callbacks=[WarmUp(mode="statistics_only")],
    )
    expected = ref.reference_run(
        tiny_gpt2(),
        word_tokenizer(),
        [GPT2_SITE],
        turns(ROWS[:30]),
        step_size=1e-3,
        ridge=1.0,
        warmup_turns=turns(WARMUP),
        warmup_mode="statistics_only",
    )
    assert relative_difference(updates(editor)[GPT2_SITE], expected.accumulated[GPT2_SITE]) < 1e-4


@pytest.mark.parametrize("scope", ["site", "shape"])
@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
def test_passes_with_relative_settings_equal_the_reference(
    tmp_path: Path, llama_folder: str, normalization: str, scope: str
) -> None:
    """Three turns find their scales anew, the later ones have that of the first with as many rows as outputs."""
    stream = write_stream(tmp_path / "edits.jsonl", ROWS[:32])
    relative = {"relative_step": 0.2, "relative_ridge": 0.05}
    method = {"normalization": normalization, "passes": 4, "enough_margin": 0.4, "statistics_scope": scope, **relative}
    editor = fit(
        tmp_path / "run",
        llama_folder,
        {"path": stream, "turn_size": TURN},
        {"sites": LLAMA_SITES, "step_size": None, "ridge": None, **method},
    )
    expected = ref.reference_run(tiny_llama(), word_tokenizer(), LLAMA_SITES, turns(ROWS[:32]), **method)
    for name, update in updates(editor).items():
        assert expected.accumulated[name].norm() > 0.05 * editor.sites[0].original.norm()
        assert relative_difference(update, expected.accumulated[name]) < 1e-4
    assert len(editor.state.scales) == (2 if scope == "site" else 1)
    for other in ({"passes": 3}, {"enough_margin": 0.6}, {"relative_step": 0.21}):
        changed = ref.reference_run(
            tiny_llama(), word_tokenizer(), LLAMA_SITES, turns(ROWS[:32]), **{**method, **other}
        )
        assert relative_difference(changed.accumulated[LLAMA_SITE], expected.accumulated[LLAMA_SITE]) > 1e-3


def test_settings_that_differ_give_another_update(tmp_path: Path, llama_folder: str) -> None:
    """Negative control: the comparison above can tell settings apart."""
    stream = write_stream(tmp_path / "edits.jsonl", ROWS[:30])
    editor = fit(tmp_path / "run", llama_folder, {"path": stream, "turn_size": TURN}, {"passes": 1})
    for other in ({"prior_strength": 0.5}, {"ridge": 1.1}, {"normalization": "standardize"}):
        settings = {"step_size": 1e-3, "ridge": 1.0, **other}
        expected = ref.reference_run(tiny_llama(), word_tokenizer(), [LLAMA_SITE], turns(ROWS[:30]), **settings)
        assert relative_difference(updates(editor)[LLAMA_SITE], expected.accumulated[LLAMA_SITE]) > 1e-3
    assert torch.isfinite(updates(editor)[LLAMA_SITE]).all()
