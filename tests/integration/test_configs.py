"""Every shipped configuration runs, shortened and on tiny material."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from edit_runs import ledger
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.cli.command import main

CONFIGS = Path(__file__).parents[2] / "configs"
SEVERAL = {"two_processes_cpu.yaml", "sharded.yaml"}
OVERLAYS = {"standardize.yaml", "no_normalization.yaml", "official_parity.yaml", "multi_gpu.yaml", *SEVERAL}
ALL = sorted(file.name for file in CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stableedit"])


def foreign(dataset: str, path: Path, seed: int) -> str:
    """Tiny rows in the layout of a foreign data set."""
    rows = []
    for i, row in enumerate(edit_rows(6, seed)):
        probe = row["locality"][0]
        if dataset == "zsre":
            rows.append({"subject": "w1", "src": row["prompt"], "rephrase": row["rephrases"][0], "alt": row["target"],
                         "loc": probe["prompt"], "loc_ans": probe["target"]})  # fmt: skip
        else:
            rewrite = {"prompt": "{} " + row["prompt"], "subject": "w1", "target_new": {"str": row["target"]},
                       "target_true": {"str": "w2"}}  # fmt: skip
            rows.append({"case_id": i, "requested_rewrite": rewrite, "paraphrase_prompts": row["rephrases"],
                         "neighborhood_prompts": [probe["prompt"]]})  # fmt: skip
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("name", ALL)
def test_configuration_runs(tmp_path: Path, llama_folder: str, name: str) -> None:
    files = [f"--config={CONFIGS / 'demo.yaml'}"] if name in OVERLAYS else []
    dataset = name.removesuffix(".yaml") if name in ("zsre.yaml", "counterfact.yaml") else "edits"
    if dataset == "edits":
        stream = write_stream(tmp_path / "edits.jsonl", edit_rows(6))
        warmup = write_stream(tmp_path / "warmup.jsonl", edit_rows(4, 3))
    else:
        stream = foreign(dataset, tmp_path / "edits.json", 0)
        warmup = foreign(dataset, tmp_path / "warmup.json", 3)
    arguments = [
        "fit",
        *files,
        f"--config={CONFIGS / name}",
        f"--model.base_model={llama_folder}",
        f'--model.sites=["{LLAMA_SITE}"]',
        "--model.step_size=1e-4",
        f"--data.path={stream}",
        "--data.turn_size=3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run_dir={tmp_path / 'run'}",
    ]
    own = name == "own_data.yaml"  # which feeds the statistics from the stream's own turns
    given = arguments if own else [*arguments, f"--data.warmup_path={warmup}"]
    if name in SEVERAL:  # these start a second process by their own command line
        command = [sys.executable, "-m", "stableedit_pl", *given]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)})
    else:
        main(given)
    phases = [line["phase"] for line in ledger(tmp_path / "run")]
    assert phases.count("edit") == 6
    assert (phases.count("warmup") > 0) and (not own or phases.count("warmup") == 6)
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    shipped = yaml.safe_load((CONFIGS / name).read_text())
    if name == "multi_gpu.yaml":  # added to the other file's callbacks, which stay
        assert {"WarmUp", "EditEvaluation", "StabilityMonitor", "DevicePlacement"} <= {
            callback["class_path"].rpartition(".")[2] for callback in saved["trainer"]["callbacks"]
        }
    for setting, value in shipped.get("model", {}).items():
        if setting not in ("base_model", "sites", "step_size"):
            assert saved["model"][setting] == value, setting


def test_no_configuration_but_the_papers_holds_a_setting_with_a_scale() -> None:
    """What a user lays over or copies works on any model, and leaves --model.step_size and --model.ridge free."""
    settings = {name: yaml.safe_load((CONFIGS / name).read_text()).get("model", {}) for name in ALL}
    absolute = {name for name, model in settings.items() if "step_size" in model or "ridge" in model}
    assert absolute == {"zsre.yaml", "counterfact.yaml"}
    assert not any("relative_step" in model or "relative_ridge" in model for model in settings.values())
    published = {name for name, model in settings.items() if model.get("passes") == 1}
    assert published == {*absolute, "official_parity.yaml"}


def test_the_table_of_configurations_is_complete() -> None:
    table = (CONFIGS / "README.md").read_text()
    assert all(f"`{name}`" in table for name in ALL)
