"""A run that an older version began, and stopped after turn 5, goes on with this one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import relative_difference

from stableedit_pl.cli.command import main
from stableedit_pl.run.files.checkpoint_file import read_checkpoint

KEPT = Path(__file__).parents[1] / "fixtures" / "run_before_wings"
ONE_PASS = "--model.passes=1"
"""It knows nothing of passes: one a turn was all there was."""


def test_a_run_begun_before_the_move_ends_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``finished.safetensors`` and ``finished_edits.jsonl`` are of the same run, never stopped, by the old version."""
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    before = json.loads(Path("run/edits.jsonl").read_text().splitlines()[-1])
    flags = ["--config", "settings.yaml", "--ckpt_path", "last", "--trainer.enable_progress_bar=false", ONE_PASS]
    main(["fit", *flags])
    wanted = load_file("finished.safetensors")
    found = read_checkpoint(Path("run/checkpoints/last.ckpt"))["state_dict"]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(found[name], tensor), name
        else:  # another processor may round another way
            assert relative_difference(found[name], tensor) < 1e-5, name
    lines = [
        [json.loads(line) for line in Path(f).read_text().splitlines()]
        for f in ("run/edits.jsonl", "finished_edits.jsonl")
    ]
    assert [row["id"] for row in lines[0]] == [row["id"] for row in lines[1]]
    assert before in lines[0]
