"""results.json and the table: every number with how it was taken."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stableedit_pl.data.turns import WarmUpSettings
from stableedit_pl.run.results import edits_per_second, read_results, results_table, scores_table, write_results

RESULTS: dict[str, Any] = {
    "edits": 33,
    "turns": 6,
    "warmup_turns": 1,
    "base": {"efficacy": 0.0, "generalization": 0.125, "specificity": 1.0},
    "at_edit": {"efficacy": 0.98765},
    "retained": {"efficacy": 0.5, "generalization": None, "specificity": 0.0},
    "seconds": {"edit": 6.6, "evaluate": 1.0},
}


def written(folder: Path, *, loggers: Any = (), rank_zero: bool = True, scoring: str = "token_match") -> dict[str, Any]:
    """What write_results writes for a run of stand-ins."""
    hparams = {"base_model": "m", "sites": ["a", "b"], "ridge": 10.0, "_instantiator": "cli", "dtype": torch.float32}
    model = SimpleNamespace(
        hparams=hparams,
        scoring=scoring,
        specificity_reference="base_output",
        forked_from="runs/first (5 turns)",
        base_commit=None,
    )
    stream = SimpleNamespace(
        hparams={"path": "edits.jsonl", "turn_size": 8},
        warm_up=WarmUpSettings("q1", "statistics_only", 3, "standardize"),
        checksums=lambda: {"path": "abc", "warmup_path": "def"},
    )
    trainer = SimpleNamespace(
        is_global_zero=rank_zero,
        default_root_dir=str(folder),
        precision="32-true",
        world_size=2,
        global_step=6,
        loggers=list(loggers),
    )
    write_results(trainer, model, stream, RESULTS, {"retained": "after the last turn"}, None)  # type: ignore[arg-type]
    file = folder / "results.json"
    return read_results(file) if file.exists() else {}


def test_scores_come_with_everything_that_changes_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    got = written(tmp_path)
    assert {key: got[key] for key in RESULTS} == RESULTS
    measured, settings = got["measured"], got["settings"]
    assert measured["retained"] == "after the last turn"
    assert measured["rule"].startswith("token_match: teacher forcing; fraction")
    assert "unedited model" in measured["specificity"] and "then over edits" in measured["generalization"]
    assert settings["model"] == {"base_model": "m", "sites": ["a", "b"], "ridge": 10.0, "dtype": "torch.float32"}
    assert settings["data"] == {"path": "edits.jsonl", "turn_size": 8}
    assert settings["warm_up"] == {
        "position": "q1",
        "mode": "statistics_only",
        "turns": 3,
        "normalization": "standardize",
        "own_stream": False,
    }
    assert settings["checksums"] == {"path_sha256": "abc", "warmup_path_sha256": "def"}
    assert settings["processes"] == 2
    assert (settings["scoring"], settings["seed"], settings["precision"]) == ("token_match", 7, "32-true")
    assert "<prompt>" in settings["prompt_template"] and "<target>" in settings["prompt_template"]
    assert settings["versions"]["python"] == platform.python_version()
    assert settings["versions"]["torch"] == version("torch")
    assert {"stableedit_pl", "transformers", "lightning"} <= settings["versions"].keys()


@pytest.mark.parametrize(
    ("scoring", "words"), [("exact_match", "teacher forcing; 1 if all"), ("greedy_match", "free greedy decoding")]
)
def test_each_rule_is_named_and_explained(tmp_path: Path, scoring: str, words: str) -> None:
    assert written(tmp_path, scoring=scoring)["measured"]["rule"].startswith(f"{scoring}: {words}")


def test_a_run_without_a_seed_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert written(tmp_path)["settings"]["seed"] is None


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    assert written(tmp_path, rank_zero=False) == {}


def test_the_results_given_are_left_alone(tmp_path: Path) -> None:
    before = json.dumps(RESULTS)
    written(tmp_path)
    assert json.dumps(RESULTS) == before


def test_tensorboard_gets_the_table_and_the_final_scores(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="", default_hp_metric=False)
    written(tmp_path, loggers=[logger, CSVLogger(str(tmp_path / "csv"))])
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["final/retained_efficacy"] == [(7, 0.5)] and scalars["final/retained_specificity"] == [(7, 0.0)]
    assert not any("generalization" in tag for tag in scalars)  # not measured is no point, not a zero
    (text,) = events.Tensors("results/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert table == [
        "| | efficacy | generalization | specificity |",
        "|---|---|---|---|",
        "| base | 0.000 | 0.125 | 1.000 |",
        "| at_edit | 0.988 | - | - |",
        "| retained | 0.500 | - | 0.000 |",
    ]
    assert text.step == 7


def test_the_table_lines_up() -> None:
    assert results_table(RESULTS).splitlines() == [
        "          efficacy  generalization  specificity",
        "base         0.000           0.125        1.000",
        "at-edit      0.988               -            -",
        "retained     0.500               -        0.000",
    ]


def test_one_row_of_scores() -> None:
    lines = scores_table({"edited": {"efficacy": 1.0, "specificity": None}}).splitlines()
    assert lines == ["        efficacy  generalization  specificity", "edited     1.000               -            -"]


def test_edits_per_second() -> None:
    assert edits_per_second(RESULTS) == pytest.approx(5.0)
    assert math.isnan(edits_per_second(RESULTS | {"seconds": {"edit": 0.0}}))
