"""Bad data files, configurations and checkpoints, one row each: what is said, the exit code, and that nothing changed.

Every case runs the command line against a directory that holds a run of two turns (``--ckpt_path=last``) or against an
empty one; no weight, checkpoint or ledger line may change.
"""

import errno
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_runs import PASSES, fit
from safetensors.torch import load_file, save_file
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.cli.command import main
from stableedit_pl.run.files.checkpoint_io import read_checkpoint

GOOD = edit_rows(3)


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


# what the file holds, how it is called, further options, what is said
DATA: list[tuple[str, str | bytes | None, list[str], list[str]]] = [
    ("no file", None, [], ["does not exist", "bad.jsonl"]),
    ("a directory", "<directory>", [], ["is a directory"]),
    ("no permission", "<forbidden>", [], ["permission denied", "chmod u+r"]),
    ("an empty file", "", [], ["is empty"]),
    ("only blank lines", "\n\n", [], ["bad.jsonl"]),
    ("not JSON", lines(GOOD[0], "no json"), [], ["line 2", "no valid JSON"]),
    ("truncated", lines(GOOD[0])[:-20], [], ["line 1", "no valid JSON"]),
    ("another encoding", lines(GOOD[0]).encode("utf-16"), [], ["UTF-8"]),
    ("Latin-1", '{"prompt": "caf\xe9", "target": "x"}\n'.encode("latin-1"), [], ["UTF-8", "byte"]),
    ("an array where lines are wanted", json.dumps(GOOD), [], ["array"]),
    ("a row that is a list", lines(GOOD[0], ["w1", "w2"]), [], ["line 2", "a list, not an object"]),
    ("a row that is null", lines(None), [], ["line 1", "null"]),
    ("no target", lines({"prompt": "w1"}), [], ["line 1", '"target"', "missing"]),
    ("no prompt", lines({"target": "w1"}), [], ["line 1", '"prompt"', "missing"]),
    ("an empty target", lines(GOOD[0], {"prompt": "w1", "target": ""}), [], ["line 2", '"target"', "is empty"]),
    ("a blank prompt", lines({"prompt": " ", "target": "w1"}), [], ["line 1", '"prompt"', "only white space"]),
    ("a target that is null", lines({"prompt": "w1", "target": None}), [], ['"target"', "is null, not text"]),
    ("a target that is a number", lines({"prompt": "w1", "target": 7}), [], ['"target"', "the number 7"]),
    ("a prompt that is a list", lines({"prompt": ["w1"], "target": "w2"}), [], ['"prompt"', "a list"]),
    ("rephrases that are no list", lines({**GOOD[0], "rephrases": "w1"}), [], ['"rephrases"', "line 1"]),
    ("locality without a target", lines({**GOOD[0], "locality": [{"prompt": "w1"}]}), [], ["locality", "line 1"]),
    ("an id twice", lines(GOOD[0], GOOD[0]), [], ["e0-0", "line 2"]),
    ("an unknown field", lines({**GOOD[0], "promt": "w1"}), [], ["promt", "prompt"]),
    ("a key twice", '{"prompt": "w1", "prompt": "w2", "target": "w3"}\n', [], ["line 1", "prompt"]),
    ("NaN", '{"prompt": "w1", "target": NaN}\n', [], ["line 1"]),
    ("a prompt beyond the context", lines({"prompt": "w1 " * 40, "target": "w2"}), [], ["row 1", "context is 32"]),
    ("a target beyond the context", lines({"prompt": "w1", "target": "w2 " * 40}), [], ["row 1", "context is 32"]),
    ("locality beyond the context", lines({**GOOD[0], "locality": [{"prompt": "w1 " * 40, "target": "w2"}]}), [],
     ["row 1", '"locality"', "context is 32"]),
    ("rows of another data set", lines({"src": "w1", "alt": "w2", "loc": "w3", "loc_ans": "w4"}), [], ["zsre"]),
    ("an unknown data set", lines(GOOD[0]), ["--data.dataset=zsrre"], ["zsrre"]),
    ("a data set without its fields", lines(GOOD[0]), ["--data.dataset=counterfact"], ["requested_rewrite"]),
    ("a bad warm-up file", lines(*GOOD), ["--data.warmup_path=/nowhere/w.jsonl", "--trainer.callbacks+=WarmUp"],
     ["/nowhere/w.jsonl", "does not exist"]),
]  # fmt: skip

CONFIGS: list[tuple[str, list[str], int, list[str]]] = [
    ("an unknown key", ["--model.step_sise=1"], 2, ["step_sise"]),
    ("a wrong type", ["--data.turn_size=many"], 2, ["turn_size", "many"]),
    ("an unknown choice", ["--model.statistics_scope=layer"], 2, ["statistics_scope", "layer"]),
    ("an unknown callback", ["--trainer.callbacks+=WarmUpp"], 2, ["WarmUpp"]),
    ("a configuration file that is not there", ["--config=/nowhere.yaml"], 2, ["/nowhere.yaml"]),
    ("a site that is not there", ['--model.sites=["model.layers.7.mlp.down_proj"]'], 1, ["no module", LLAMA_SITE]),
    ("a site that is no weight", ['--model.sites=["model.layers.1.mlp"]'], 1, ["LlamaMLP", "cannot be edited"]),
    ("a range that runs backwards", ['--model.sites=["model.layers.{1..0}.mlp.down_proj"]'], 1, ["backwards"]),
    ("no sites", ["--model.sites=[]"], 1, ["no sites given"]),
    ("a negative ridge", ["--model.ridge=-1"], 1, ["ridge must be positive, got -1"]),
    ("a step size of zero", ["--model.step_size=0"], 1, ["step_size must be positive"]),
    ("a negative floor", ["--model.eigenvalue_floor=-1"], 1, ["eigenvalue_floor must be zero or positive"]),
    ("a norm limit of zero", ["--model.max_update_norm=0"], 1, ["max_update_norm must be positive"]),
    ("turns of nothing", ["--data.turn_size=0"], 1, ["data.turn_size must be at least 1"]),
    ("a horizon before the warm-up's end", ["--data.warmup_path=<warmup>", "--trainer.callbacks+=WarmUp",
     "--trainer.max_steps=1"], 1, ["max_steps=1 ends before the warm-up does"]),
    ("a warm-up nobody uses", ["--data.warmup_path=<warmup>"], 1, ["add the callback WarmUp"]),
    ("gradient clipping", ["--trainer.gradient_clip_val=1"], 1, ["model.ridge"]),
    ("two epochs", ["--trainer.max_epochs=2"], 1, ["use max_epochs=1"]),
    ("a model that is not there", ["--model.base_model=/nowhere"], 1, ["no config.json in /nowhere"]),
    ("a run directory below a file", ["--run_dir=/dev/null/run"], 1, ["/dev/null/run", "cannot be written"]),
    ("a device that is not there", ["--trainer.callbacks+=DevicePlacement",
     "--trainer.callbacks.editor_device=cuda:9"], 1, ["no such device here"]),
    ("an editor that does not fit", ["--trainer.callbacks+=DevicePlacement",
     "--trainer.callbacks.turn_rows=1000000000"], 1, ["no room for the editor's state", "missing", "data.turn_size"]),
]  # fmt: skip


def other_method(run: Path) -> list[str]:
    return ["--model.ridge=9"]


def truncate(run: Path) -> list[str]:
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    return []


def no_permission(run: Path) -> list[str]:
    for file in (run / "checkpoints").iterdir():
        forbid(file)
    return []


def another_model(run: Path) -> list[str]:
    """The same architecture and sites, one weight of the site changed: only the content tells."""
    folder = run.parent / "other"
    shutil.copytree(run.parent / "base", folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{LLAMA_SITE}.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return [f"--model.base_model={folder}"]


def half_written(run: Path) -> list[str]:
    (run / "checkpoints/.turn=9.ckpt.tmp").write_bytes(b"PK half")
    return [f"--ckpt_path={run / 'checkpoints/.turn=9.ckpt.tmp'}"]


def malicious(run: Path) -> list[str]:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(run / "executed"),))

    file = run / "checkpoints/last.ckpt"
    torch.save({**read_checkpoint(file), "extra": Evil()}, file)
    return []


def a_bare_pickle(run: Path) -> list[str]:
    (run / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    return [f"--ckpt_path={run / 'evil.ckpt'}"]


def missing_weight(run: Path) -> list[str]:
    file = run / "checkpoints/last.ckpt"
    checkpoint = read_checkpoint(file)
    del checkpoint["state_dict"][f"model.{LLAMA_SITE}.weight"]
    torch.save(checkpoint, file)
    return []


def not_ours(run: Path) -> list[str]:
    file = run / "checkpoints/last.ckpt"
    checkpoint = read_checkpoint(file)
    del checkpoint["stableedit"]
    torch.save(checkpoint, file)
    return []


def no_ledger(run: Path) -> list[str]:
    (run / "edits.jsonl").unlink()
    return []


FORBIDDEN: set[Path] = set()


def forbid(path: Path) -> None:
    """Nobody may read this file: a permission that even root lacks, because the open itself is refused."""
    FORBIDDEN.add(path)


@pytest.fixture(autouse=True)
def forbidden_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = io.open

    def guarded(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, (str, Path)) and Path(file) in FORBIDDEN:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", guarded)  # what pathlib calls
    monkeypatch.setattr("builtins.open", guarded)
    yield
    FORBIDDEN.clear()


CHECKPOINTS: list[tuple[str, Callable[[Path], list[str]], list[str]]] = [
    ("another method", other_method, ["ridge", "--fork_from"]),
    ("another turn size", lambda run: ["--data.turn_size=3"], ["turn_size"]),
    ("other sites", lambda run: ['--model.sites=["model.layers.0.mlp.down_proj"]'], ["sites"]),
    ("all truncated", truncate, ["every checkpoint", "damaged"]),
    ("no permission", no_permission, ["every checkpoint", "Permission denied"]),
    ("another base model", another_model, ["base_model", "--fork_from"]),
    ("half written", half_written, ["damaged"]),
    ("malicious", malicious, ["nothing in it was executed"]),
    ("a bare pickle", a_bare_pickle, ["damaged"]),
    ("a weight is missing", missing_weight, ["missing", LLAMA_SITE]),
    ("of another program", not_ours, ["not written by stableedit_pl"]),
    ("a ledger that is gone", no_ledger, ["edits.jsonl", "the checkpoint knows 16 lines"]),
    ("a file that is not there", lambda run: ["--ckpt_path=/nowhere.ckpt"], ["/nowhere.ckpt", "no such file"]),
]


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stableedit"])


def contents(folder: Path) -> dict[str, bytes]:
    def content(file: Path) -> bytes:
        with os.fdopen(os.open(file, os.O_RDONLY), "rb") as stream:  # forbidden files too
            return stream.read()

    return {str(f.relative_to(folder)): content(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def options(llama_folder: str, path: str, run: Path) -> list[str]:
    return [
        "fit",
        f"--model.base_model={llama_folder}",
        f'--model.sites=["{LLAMA_SITE}"]',
        "--model.step_size=1e-3",
        "--model.ridge=1.0",
        f"--model.passes={PASSES}",
        f"--data.path={path}",
        "--data.turn_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run_dir={run}",
    ]


def refused(arguments: list[str], code: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == code, message
    assert "Traceback" not in message
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(("content", "more", "said"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_bad_data(
    tmp_path: Path,
    llama_folder: str,
    content: str | bytes | None,
    more: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    if content == "<directory>":
        path.mkdir()
    elif content == "<forbidden>":
        path.write_text(lines(*GOOD))
        forbid(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    code = 2 if any("dataset=zsrre" in option for option in more) else 1
    refused([*options(llama_folder, str(path), tmp_path / "run"), *more], code, said, capsys)
    assert not (tmp_path / "run").exists(), "a refused start leaves nothing"


@pytest.mark.parametrize(("more", "code", "said"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_bad_configuration(
    tmp_path: Path,
    llama_folder: str,
    stream_file: str,
    warmup_file: str,
    more: list[str],
    code: int,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [option.replace("<warmup>", warmup_file) for option in more]
    refused([*options(llama_folder, stream_file, tmp_path / "run"), *more], code, said, capsys)
    assert not (tmp_path / "run").exists(), "a refused start leaves nothing"


@pytest.mark.parametrize(("harm", "said"), [case[1:] for case in CHECKPOINTS], ids=[case[0] for case in CHECKPOINTS])
def test_bad_checkpoint(
    tmp_path: Path,
    llama_folder: str,
    stream_file: str,
    harm: Callable[[Path], list[str]],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    fit(run, llama_folder, {"path": stream_file}, trainer={"max_steps": 2})
    shutil.copytree(llama_folder, tmp_path / "base")
    more = harm(run)
    before = contents(run)
    refused([*options(llama_folder, stream_file, run), "--ckpt_path=last", *more], 1, said, capsys)
    assert contents(run) == before
    assert not (run / "executed").exists()


def test_a_good_row_is_no_bad_input(tmp_path: Path, llama_folder: str) -> None:
    """Negative control: the same options with good rows run."""
    main(options(llama_folder, write_stream(tmp_path / "good.jsonl", GOOD), tmp_path / "run"))
    assert (tmp_path / "run/results.json").exists()


def test_the_tables_are_long_enough() -> None:
    assert len(DATA) + len(CONFIGS) + len(CHECKPOINTS) >= 60
