"""A base model's files: found where loading finds them, and known again by all of their weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA_SITE, save_model, tiny_llama

from stableedit_pl.errors import IncompatibleCheckpoint
from stableedit_pl.model.files.base_files import base_folder, folder_at_hand, weight_files
from stableedit_pl.model.files.weights_digest import weights_digest
from stableedit_pl.run.files.saved_state import refuse_other_run


def folder_of(path: Path, model: Any = None, **options: Any) -> Path:
    (model or tiny_llama()).save_pretrained(path, **options)
    return path


# ---- which files


def test_the_files_are_those_that_loading_takes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "shards", max_shard_size="6KB")
    index, files = weight_files(folder)
    assert index == [folder / "model.safetensors.index.json"] and files == sorted(folder.glob("model-*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")
    assert weight_files(folder) == (index, files)
    save_file({}, folder / "model.safetensors")
    assert weight_files(folder) == ([], [folder / "model.safetensors"])
    for file in [*folder.glob("*.safetensors"), *index]:
        file.unlink()
    assert weight_files(folder) == ([], [folder / "pytorch_model.bin"])
    (folder / "pytorch_model.bin").unlink()
    assert weight_files(folder) == ([], []) and weights_digest(folder) is None


def test_a_folder_that_is_not_there_is_nowhere(tmp_path: Path) -> None:
    assert folder_at_hand(str(tmp_path / "none")) is None
    assert folder_at_hand("somebody/no-such-model") is None
    assert base_folder(str(tmp_path)) == tmp_path


# ---- the digest


def test_the_digest_sees_every_weight_and_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    seen = {weights_digest(folder)}
    for name in weights:
        changed = weights[name].clone()
        changed.view(-1)[-1] += 1e-6
        save_file(weights | {name: changed}, folder / "model.safetensors")
        seen.add(weights_digest(folder))
    first, second = "model.layers.0.mlp.down_proj.weight", f"{LLAMA_SITE}.weight"
    save_file(weights | {first: weights[second], second: weights[first]}, folder / "model.safetensors")
    seen.add(weights_digest(folder))
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    seen.add(weights_digest(folder))
    assert len(seen) == len(weights) + 3


def test_the_digest_does_not_depend_on_how_the_weights_lie_in_files(tmp_path: Path) -> None:
    one = weights_digest(folder_of(tmp_path / "one"))
    assert weights_digest(folder_of(tmp_path / "shards", max_shard_size="6KB")) == one
    (tmp_path / "pickled").mkdir()
    torch.save(tiny_llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert weights_digest(tmp_path / "pickled") == one and one is not None


# ---- what a checkpoint says of it

OLD = {"base_model": "c", "base_weights": "w", "sites": ["s"], "step_size": 1.0}


def run(commit: str | None = None, **changes: Any) -> dict[str, Any]:
    return {"fingerprint": OLD | changes, "base_commit": commit}


def test_another_base_model_is_refused_with_the_commits() -> None:
    refuse_other_run("it", run("a"), run("b"))  # another commit with the same weights
    with pytest.raises(IncompatibleCheckpoint) as raised:
        refuse_other_run("it", run("a"), run("b", base_weights="x"))
    assert "\n  base_weights  w      x\n" in str(raised.value)
    assert "It was commit a of the hub's repository, and is b now. Give the one" in str(raised.value)
    with pytest.raises(IncompatibleCheckpoint, match=r"another one now\. Give the one"):
        refuse_other_run("it", run(), run(base_weights="x"))
    with pytest.raises(IncompatibleCheckpoint) as raised:
        refuse_other_run("it", run(), run(step_size=2.0))
    assert "base_weights" not in str(raised.value)


def test_checkpoints_of_before_are_held_by_what_they_know() -> None:
    before = {"fingerprint": {name: value for name, value in OLD.items() if name != "base_weights"}}
    refuse_other_run("it", before, run("b"))
    refuse_other_run("it", run("a"), run(base_weights=None))
    with pytest.raises(IncompatibleCheckpoint, match="base_model"):
        refuse_other_run("it", before, run(base_model="d"))


def test_a_fork_needs_the_same_model_and_may_change_the_rest() -> None:
    only = ("base_model", "base_weights", "sites")
    refuse_other_run("it", run(), run(step_size=2.0), only)
    with pytest.raises(IncompatibleCheckpoint, match="base_weights"):
        refuse_other_run("it", run(), run(base_weights="x"), only)


def test_precision_is_compared_where_it_is_given() -> None:
    refuse_other_run("it", run() | {"precision": "32"}, run())
    with pytest.raises(IncompatibleCheckpoint, match="precision"):
        refuse_other_run("it", run() | {"precision": "32"}, run() | {"precision": "16"})


# ---- a hub's snapshot

HUB = """
import json, sys
from pathlib import Path
import torch
from stableedit_pl import LifelongEditor
editor = LifelongEditor(base_model="somebody/tiny", sites=[sys.argv[1]], step_size=1e-3)
editor.configure_model()
with torch.no_grad():
    editor.sites[0].module.weight.add_(1.0)
editor.save_pretrained(sys.argv[2])
print(json.dumps([editor.identity()["base_commit"], editor.identity()["fingerprint"]["base_weights"]]))
"""


def test_a_hub_ids_snapshot_is_exported_and_its_commit_recorded(tmp_path: Path) -> None:
    """In a process of its own, offline, with a cache as huggingface_hub makes it: links to blobs."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    files = Path(save_model(tmp_path / "files", tiny_llama()))
    (files / "preprocessor_config.json").write_text("{}")
    repository = cache / "models--somebody--tiny"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in files.iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    done = subprocess.run(
        [sys.executable, "-c", HUB, LLAMA_SITE, str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'["{commit}", "{weights_digest(files)}"]'
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {file.name for file in files.iterdir()}
    assert not any(file.is_symlink() for file in out.iterdir())
    same = [file.name for file in files.iterdir() if file.read_bytes() == (out / file.name).read_bytes()]
    assert len(same) == len(list(files.iterdir())) - 1 and "model.safetensors" not in same
