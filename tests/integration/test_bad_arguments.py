"""Bad arguments, one row each, in process: one message, no traceback, the exit code, and an untouched run directory.

``test_bad_input.py`` has bad data files and checkpoints.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from edit_runs import fit
from tiny import LLAMA_SITE, edit_rows, write_stream

from stableedit_pl.cli.command import main
from stableedit_pl.cli.front_page import VERBS

FILES = {
    "typo.yaml": "model:\n  ridge: 1.0\n  step_sise: 1.0e-3\n",
    "group.yaml": "modle: {step_size: 1.0e-3}\n",
    "type.yaml": "data:\n  turn_size: many\n",
    "callback.yaml": "trainer:\n  callbacks:\n  - class_path: EditEvaluations\n",
    "setting.yaml": "trainer:\n  callbacks:\n  - class_path: EditEvaluation\n    init_args:\n      every_n_turn: 3\n",
    "value.yaml": "trainer:\n  callbacks:\n  - class_path: WarmUp\n    init_args: {mode: edti}\n",
    "broken.yaml": "model: {ridge: [\n",
    "scalar.yaml": "seed_everything: 1\nmodel: 3\n",
    "list.yaml": "- 1\n- 2\n",
    "text.yaml": "just a text\n",
    "empty.yaml": "# nothing\n",
    "twice.yaml": "model: {ridge: 1.0}\ndata: {turn_size: 4}\nmodel: {ridge: 2.0}\n",
    "twice_inside.yaml": "model:\n  ridge: 1.0\n  ridge: 2.0\n",
    "latin.yaml": "run_dir: caf\xe9\n",
    "dollar.yaml": "run_dir: ${HOME}/runs\n",
    "dollar_open.yaml": "run_dir: ${HOME\n",
    "top.yaml": "run_dirr: runs/x\n",
}

# arguments behind the verb and those of a good run, what is said; <dir> is a folder with FILES
PARSED: list[tuple[str, list[str]]] = [
    ("fit --model.step_sise=1", ["there is no --model.step_sise. Did you mean --model.step_size"]),
    ("fit --step_size=1", ["there is no --step_size. Did you mean --model.step_size?"]),
    ("fit --modle.step_size=1", ["--modle.step_size. Did you mean --model.step_size"]),
    ("fit --data.turnsize 3", ["there is no --data.turnsize. Did you mean --data.turn_size"]),
    ("fit --trainer.maxsteps=3", ["Did you mean --trainer.max_steps"]),
    ("fit --zzz=3", ["there is no --zzz. stableedit fit --help lists all."]),
    ("fit --cpkt_path last", ["Did you mean --ckpt_path?"]),
    ("fit --print_confg", ["Did you mean --print_config?"]),
    ("fit extra", ["extra: no flag stands before it"]),
    ("fit --run_dir", ["--run_dir needs a value"]),
    ("fit --model.ridge", ["--model.ridge needs a value"]),
    ("fit --model.ridge=high", ["model.ridge is high, but must be a number or null"]),
    ("fit --data.turn_size=many", ["data.turn_size is many, but must be a whole number"]),
    ("fit --data.turn_size=1.5", ["data.turn_size is 1.5, but must be a whole number"]),
    ("fit --overwrite=maybe", ["overwrite is maybe, but must be true or false"]),
    ("fit --seed_everything=abc", ["seed_everything is abc, but must be true or false or a whole number"]),
    ("fit --trainer.max_steps=ten", ["trainer.max_steps is ten, but must be a whole number"]),
    ("fit --trainer.enable_progress_bar=perhaps", ["must be true or false or null"]),
    ("fit --model.normalization=whitened", ["must be one of whiten, standardize, none. Did you mean whiten?"]),
    ("fit --model.scoring=tokenmatch", ["Did you mean token_match"]),
    ("fit --data.dataset=zsrre", ["data.dataset is zsrre", "Did you mean zsre?"]),
    ("fit --data.on_bad_row=skipp", ["must be one of raise, skip. Did you mean skip?"]),
    ("fit --trainer.precision=16-mixd", ["trainer.precision is 16-mixd", "Did you mean 16-mixed"]),
    ("fit --trainer.callbacks+=EditEvaluations", ["no callback EditEvaluations. Did you mean EditEvaluation?"]),
    ("fit --trainer.callbacks+=ModelCheckpont", ["Did you mean ModelCheckpoint"]),
    ("fit --trainer.callbacks+=Mine", ["there is no callback Mine.", "my_package.MyCallback"]),
    ("fit --trainer.callbacks+=nowhere.Mine", ["nowhere.Mine cannot be a callback: No module named 'nowhere'"]),
    ("fit --trainer.callbacks+=json.JSONDecoder", ["json.JSONDecoder is no callback"]),
    ("fit --trainer.callbacks=3", ["there is no callback 3"]),
    ("fit --trainer.callbacks+=EditEvaluation --trainer.callbacks.every_n_turn=3",
     ["EditEvaluation has no setting every_n_turn. Did you mean every_n_turns?"]),
    ("fit --trainer.callbacks+=WarmUp --trainer.callbacks.zzz=3", ["WarmUp has no setting zzz. It has: position, "]),
    ("fit --trainer.callbacks+=EditEvaluation --trainer.callbacks.every_n_turns=abc",
     ["EditEvaluation.every_n_turns is abc, but must be a whole number or null"]),
    ("fit --trainer.callbacks+=WarmUp --trainer.callbacks.mode=edti",
     ["WarmUp.mode is edti, but must be one of edit, statistics_only. Did you mean edit?"]),
    ("fit --trainer.callbacks.every_n_turns=3",
     ["a setting of which callback?", "--trainer.callbacks.NAME.every_n_turns"]),
    ("fit --trainer.callbacks.EditEvaluation.every_n_turn=3", ["Did you mean every_n_turns?"]),
    ("fit --trainer.callbacks.EditEvaluation.every_n_turns=abc", ["must be a whole number or null"]),
    ("fit --trainer.callbacks.EditEvaluation.every_n_turns", ["needs a value"]),
    ("fit --trainer.callbacks.StabilityMonitor.x=3",
     ["the run has no StabilityMonitor; add it with --trainer.callbacks+="]),
    ("fit --trainer.callbacks.StabilityMonitr.x=3",
     ["there is no callback StabilityMonitr. Did you mean StabilityMonitor?"]),
    ("fit --trainer.callbacks+=EarlyStopping", ["EarlyStopping needs monitor: --trainer.callbacks.monitor=VALUE"]),
    ("fit --trainer.logger=CSVLoger", ["there is no logger CSVLoger. Did you mean CSVLogger"]),
    ("fit --trainer.logger=TensorBoardLogger", ["TensorBoardLogger needs save_dir"]),
    ("fit --config=<dir>/typo.yaml",
     ["typo.yaml, line 3: there is no setting model.step_sise. Did you mean model.step_size"]),
    ("fit --config=<dir>/group.yaml",
     ["group.yaml, line 1: there is no setting modle.step_size. Did you mean model.step_size?"]),
    ("fit --config=<dir>/top.yaml", ["top.yaml, line 1: there is no setting run_dirr. Did you mean run_dir?"]),
    ("fit --config=<dir>/type.yaml", ["type.yaml, line 2: data.turn_size is many, but must be a whole number"]),
    ("fit --config=<dir>/callback.yaml", ["callback.yaml, line 3: there is no callback EditEvaluations. Did you mean"]),
    ("fit --config=<dir>/setting.yaml",
     ["setting.yaml, line 5: EditEvaluation has no setting every_n_turn. Did you mean"]),
    ("fit --config=<dir>/value.yaml", ["value.yaml, line 4: WarmUp.mode is edti"]),
    ("fit --config=<dir>/broken.yaml", ["broken.yaml, line 2, column 1: is no valid YAML"]),
    ("fit --config=<dir>/scalar.yaml", ["scalar.yaml, line 2: model is 3, but it is a group of settings"]),
    ("fit --config=<dir>/list.yaml", ["list.yaml holds a list, not settings"]),
    ("fit --config=<dir>/text.yaml", ["text.yaml holds the text 'just a text', not settings"]),
    ("fit --config=<dir>/empty.yaml", ["empty.yaml is empty"]),
    ("fit --config=<dir>/twice.yaml", ["twice.yaml, line 3: model stands there twice (also in line 1)"]),
    ("fit --config=<dir>/twice_inside.yaml", ["line 3: model.ridge stands there twice"]),
    ("fit --config=<dir>/latin.yaml", ["latin.yaml is not UTF-8", "0xe9"]),
    ("fit --config=<dir>/nowhere.yaml", ["nowhere.yaml: there is no such file"]),
    ("fit --config=<dir>", ["is a directory"]),
    ("fit --config", ["--config needs a value"]),
    ("fit --config=<dir>/dollar.yaml", ["'.HOME' not found", "${oc.env:NAME}"]),
    ("fit --config=<dir>/dollar_open.yaml", ["${oc.env:NAME}"]),
    ("fit --run_dir=${HOME}/runs", ["'HOME' not found", "${oc.env:NAME}"]),
    ("validate --cktp_path last", ["there is no --cktp_path. Did you mean --ckpt_path?"]),
    ("test --data.pth=x", ["there is no --data.pth. Did you mean --data.path"]),
    ("tune --minuts=1", ["there is no --minuts. Did you mean --minutes?"]),
    ("predict --zzz=x", ["there is no --zzz. stableedit predict --help lists all."]),
]  # fmt: skip

ALONE: list[tuple[str, list[str]]] = [
    ("fti", ["there is no verb fti. Did you mean fit?"]),
    ("exprot --run x", ["there is no verb exprot. Did you mean export?"]),
    ("zzz", ["there is no verb zzz. Verbs: fit, validate"]),
    ("", [f"no verb: choose from {', '.join(VERBS)}; stableedit --help"]),
    ("fit", ["fit needs --model.base_model, --model.sites, --data.path, or --config FILE with it all"]),
    ("validate --model.base_model=demo", ["validate needs --model.sites, --data.path"]),
    ("export", ["export needs --run, --out"]),
    ("export --rnu=x", ["there is no --rnu. Did you mean --run?"]),
    ("export --run=x --out", ["--out needs a value"]),
    ("verify", ["verify needs --run"]),
    ("verify --run_dir=x", ["there is no --run_dir. Did you mean --run?"]),
    ("verify x", ["x: no flag stands before it"]),
]

REFUSED: list[tuple[str, list[str]]] = [
    ("fit --trainer.barebones=true", ["trainer.barebones would leave out checkpoints"]),
    ("fit --trainer.logger=WandbLogger", ["WandbLogger", "wandb", "pip install"]),
    ("fit --trainer.logger=MLFlowLogger", ["mlflow"]),
    ("fit --trainer.accelerator=foo", ["accelerator='foo'"]),
    ("fit --trainer.strategy=foo", ["strategy='foo'"]),
    ("fit --trainer.devices=0", ["devices"]),
    ("fit --trainer.profiler=foo", ["profiler"]),
    ("fit --trainer.plugins=foo", ["plugin foo"]),
    ("fit --trainer.max_time=abc", ["is not a valid duration"]),
    ("fit --trainer.max_steps=0", ["max_steps=0 leaves no turn"]),
    ("fit --trainer.max_steps=-2", ["max_steps"]),
    ("fit --trainer.num_nodes=0", ["num_nodes"]),
    ("fit --trainer.rank_timeout=-1", ["trainer.rank_timeout must be positive"]),
    ("fit --trainer.fast_dev_run=true", ["fast_dev_run would drop turns"]),
    ("fit --trainer.callbacks+=EMAWeightAveraging", ["EMAWeightAveraging puts averaged weights"]),
    ("fit --trainer.callbacks+=RichProgressBar", ["RichProgressBar"]),
    (
        "fit --trainer.callbacks+=ModelCheckpoint --trainer.callbacks+=ModelCheckpoint",
        ["two callbacks ModelCheckpoint"],
    ),
    ("fit --trainer.callbacks+=LearningRateMonitor --trainer.logger=false", ["LearningRateMonitor"]),
    ("fit --trainer.callbacks+=DeviceStatsMonitor --trainer.logger=false", ["DeviceStatsMonitor"]),
    ("fit --trainer.callbacks+=WarmUp --trainer.callbacks.turns=0", ["WarmUp.turns must be at least 1, got 0"]),
    ("fit --trainer.callbacks.TurnCheckpoint.keep=0", ["TurnCheckpoint.keep must be positive, got 0"]),
    ("fit --model.step_size -1e-3", ["step_size must be positive, got -0.001"]),
    ("fit --model.sites model.layers.{0..7}.mlp.down_proj", ["which has layers 0..1. Near matches"]),
    ("fit --model.sites=", ["site pattern ''"]),
    ("fit --data.num_workers=-1", ["data.num_workers must be zero or positive"]),
    ("fit --data.path=", ["data.path is empty"]),
    ("fit --data.warmup_path=", ["data.warmup_path is empty"]),
    ("fit --seed_everything=-1", ["seed_everything: -1 is not in bounds"]),
    ("fit --run_dir=", ["run_dir is empty"]),
    ("fit --run_dir=$HOME/runs/new", ["has a $ that no shell has replaced"]),
    ("fit --ckpt_path=", ["--ckpt_path is empty"]),
    ("fit --ckpt_path=last", ["there is nothing to resume"]),
    ("fit --fork_from=<dir>", ["--fork_from <dir>: has no checkpoint, so there is nothing to start from"]),
    ("fit --fork_from=<dir>/none", ["--fork_from <dir>/none: there is no such file"]),
    ("validate --ckpt_path=last", ["there is no edited model to ask"]),
    ("test --ckpt_path=<dir>/none.ckpt", ["--ckpt_path <dir>/none.ckpt: there is no such file"]),
    ("predict --ckpt_path=last", ["there is no edited model to ask"]),
]

BESIDE: list[tuple[str, list[str]]] = [
    ("fit", ["already holds a run", "--overwrite true"]),
    ("fit --overwrite=true --data.path=/nowhere.jsonl", ["/nowhere.jsonl: does not exist"]),
    ("fit --overwrite=true --model.sites=nothing", ["site pattern 'nothing'"]),
    ("fit --overwrite=true --trainer.callbacks+=SpikeDetectio", ["Did you mean SpikeDetection?"]),
    ("fit --ckpt_path=last --model.ridge=7", ["ridge", "--fork_from"]),
    ("fit --ckpt_path=last --data.turn_size=3", ["turn_size"]),
    ("fit --ckpt_path=<run>/checkpoints", ["it is a directory, not a checkpoint file", "turn=2.ckpt"]),
    ("fit --fork_from=<run>", ["already holds a run"]),
    ("validate --ckpt_path=last --model.ridge=7", ["ridge", "--config RUN_DIR/config.yaml", "the base model is asked"]),
    ("predict --ckpt_path=last --model.sites=model.layers.0.mlp.down_proj", ["sites"]),
    ("export --run=<run> --out=<run>", ["is not empty"]),
    ("export --run=<run> --out=<run>/config.yaml", ["is a file; choose a folder"]),
    ("export --run=<run> --out=<new> --ckpt_path=<run>/config.yaml", ["config.yaml is damaged"]),
    ("export --run=<run>/checkpoints --out=<new>", ["has no checkpoint, so there is nothing to export"]),
    ("verify --run=<run>/checkpoints", ["there is no run"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FILES, a stream, and a run of two turns to copy."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "files").mkdir()
    for name, content in FILES.items():
        (folder / "files" / name).write_bytes(content.encode("latin-1" if name == "latin.yaml" else "utf-8"))
    write_stream(folder / "rows.jsonl", edit_rows(16))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path, llama_folder: str) -> Path:
    fit(place / "finished", llama_folder, {"path": str(place / "rows.jsonl")}, {"passes": 1})
    return place / "finished"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be left in the current directory either."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["stableedit"])
    yield
    assert not list(cwd.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


def good(llama_folder: str, place: Path, run: Path) -> list[str]:
    return [
        f"--model.base_model={llama_folder}",
        f'--model.sites=["{LLAMA_SITE}"]',
        "--model.step_size=1e-3",
        "--model.ridge=1.0",
        "--model.passes=1",
        f"--data.path={place / 'rows.jsonl'}",
        "--data.turn_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run_dir={run}",
    ]


def message(arguments: list[str], code: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    text = capsys.readouterr().err
    assert stopped.value.code == code, text
    assert [part for part in said if part not in text] == [], text
    assert text.count("Error: ") == 1 and "Traceback" not in text and "usage:" not in text, text
    return text


@pytest.mark.parametrize(("typed", "said"), PARSED, ids=[typed for typed, _ in PARSED])
def test_wrong_arguments_are_answered_in_one_line(
    tmp_path: Path, place: Path, llama_folder: str, typed: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *more = typed.replace("<dir>", str(place / "files")).split(" ")
    run = tmp_path / "run"
    text = message([verb, *good(llama_folder, place, run), *more], 2, said, capsys)
    assert len(text.strip().splitlines()) == 1 and not run.exists()


@pytest.mark.parametrize(("typed", "said"), ALONE, ids=[typed or "nothing" for typed, _ in ALONE])
def test_verbs_and_what_they_need(typed: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(message(typed.split(), 2, said, capsys).strip().splitlines()) == 1


@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refused_settings_leave_no_run_directory(
    tmp_path: Path, place: Path, llama_folder: str, typed: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(place / "files")
    verb, *more = typed.replace("<dir>", folder).split(" ")
    run = tmp_path / "run"
    message([verb, *good(llama_folder, place, run), *more], 1, [part.replace("<dir>", folder) for part in said], capsys)
    assert not run.exists()


@pytest.mark.parametrize(("typed", "said"), BESIDE, ids=[typed for typed, _ in BESIDE])
def test_a_run_that_is_there_stays_untouched(
    tmp_path: Path,
    place: Path,
    finished: Path,
    llama_folder: str,
    typed: str,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    verb, *more = typed.replace("<run>", str(run)).replace("<new>", str(tmp_path / "new")).split(" ")
    own = [] if verb in ("export", "verify") else good(llama_folder, place, run)
    message([verb, *own, *more], 2 if "SpikeDetectio" in typed else 1, said, capsys)
    assert contents(run) == before and not (tmp_path / "new").exists()


def test_the_tables_are_long_enough() -> None:
    assert len(PARSED) + len(ALONE) + len(REFUSED) + len(BESIDE) >= 120


def test_a_good_command_is_no_bad_one(tmp_path: Path, place: Path, llama_folder: str) -> None:
    """Negative control."""
    main(["fit", *good(llama_folder, place, tmp_path / "run"), "--trainer.max_steps=1"])
    assert (tmp_path / "run/results.json").exists()
