"""Everything the README shows is run: commands, Python, the row of data, and the table it prints."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_model, tiny_llama, word_tokenizer

from stableedit_pl.data.readers import read_records

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIT = "stableedit fit --config configs/demo.yaml --ckpt_path last"

# Every command of the README, in the order in which it is run here, with what is added to keep it short.
COMMANDS = {
    "bash scripts/demo.sh": "",
    "bash scripts/test.sh": "--collect-only -q tests/unit/test_records.py",
    "tensorboard --logdir runs/demo": "--inspect",
    FIT: "",
    "stableedit fit --config my_run.yaml": "",
    "stableedit tune --config my_run.yaml --rows other_edits.jsonl": "--trials 1",
    "stableedit fit --config my_run.yaml --config tuned.yaml --run_dir runs/tuned": "",
    "stableedit validate --config configs/demo.yaml --ckpt_path last": "",
    "stableedit test --config configs/demo.yaml --ckpt_path last": "",
    "stableedit predict --config configs/demo.yaml --ckpt_path last": "",
    "stableedit export --run runs/demo --out runs/edited": "",
    "stableedit verify --run runs/demo": "",
    "stableedit fit --config configs/demo.yaml --config configs/standardize.yaml --fork_from runs/demo "
    "--run_dir runs/fork": "--trainer.max_steps 6",
    "stableedit fit --config configs/demo.yaml --config configs/two_processes_cpu.yaml "
    "--run_dir runs/two": "--trainer.max_steps 6",
}


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def scores(text: str) -> dict[str, list[str]]:
    """Rows of the table that a run ends with."""
    found = {}
    for name in ("base", "at-edit", "retained"):
        row = re.search(rf"^{name} +(.*)$", text, flags=re.MULTILINE)
        assert row, f"no row {name} in:\n{text}"
        found[name] = row.group(1).split()
    return found


def plain(line: str) -> str:
    """A line of output without its figures and without where the environment lies."""
    return re.sub(r"[\d.]+", "0", re.sub(r"\S*/bin/", "", line))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy in which this interpreter's environment counts as installed."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "configs", "pyproject.toml", "constraints.txt", "tests", "stableedit_pl", "callbacks"):
        (copy / name).symlink_to(ROOT / name)
    (copy / ".venv").symlink_to(sys.prefix)
    row = blocks("json")[0]
    (copy / "edits.jsonl").write_text(row, encoding="utf-8")
    own = (ROOT / "configs/own_data.yaml").read_text()
    words = sorted(set(re.findall(r"[^\s\"]+", row)))  # the demo's tokenizer has not even all letters
    others = [{"prompt": " ".join(words[i : i + 3]), "target": words[i + 4]} for i in range(8)]
    (copy / "other_edits.jsonl").write_text("".join(json.dumps(other) + "\n" for other in others), encoding="utf-8")
    model = save_model(copy / "model", tiny_llama(vocab=len(words) + 4), word_tokenizer(words))
    own = own.replace("FOLDER_OR_HUB_ID", model).replace("PATH_TO_EDITS", "edits.jsonl")
    (copy / "my_run.yaml").write_text(
        own.replace("model.layers.{28..31}.mlp.down_proj", "model.layers.1.mlp.down_proj")
    )
    return copy


def run(checkout: Path, command: str) -> str:
    environment = {**os.environ, "PATH": f"{checkout / '.venv/bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"STABLEEDIT_NO_INSTALL": "1", "STABLEEDIT_VENV": sys.prefix}
    done = subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_and_snippet_works(checkout: Path) -> None:
    shown = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert set(shown) == set(COMMANDS), "a command of the README is not run here"
    printed = {command: run(checkout, f"{command} {more}") for command, more in COMMANDS.items()}

    assert "turn/s" not in README, "the README shows results, no progress bar"
    (transcript,) = blocks("text")
    printed_lines = [line for line in printed["bash scripts/demo.sh"].splitlines() if line.strip()]
    shown_lines = [line for line in transcript.splitlines() if line.strip()]
    assert [plain(line) for line in shown_lines] == [plain(line) for line in printed_lines]
    expected, found = scores(README), scores(printed["bash scripts/demo.sh"])
    for name, cells in expected.items():
        assert [cell == "-" for cell in cells] == [cell == "-" for cell in found[name]]
        # The last digits depend on the processor's order of summation; a fact more or less is 0.002.
        for shown_cell, found_cell in zip(cells, found[name], strict=True):
            assert shown_cell == "-" or float(found_cell) == pytest.approx(float(shown_cell), abs=0.02)
    retained = [float(cell) for cell in found["retained"]]
    assert retained[0] >= 0.85 and retained[1] >= 0.75 and retained[2] >= 0.75
    assert "tensorboard --logdir runs/demo" in printed["bash scripts/demo.sh"]
    results = json.loads((checkout / "runs/demo/results.json").read_text())
    assert results["edits"] >= 500 and results["turns"] - results["warmup_turns"] >= 25
    assert scores(printed[FIT]) == found, "resuming a finished run gives its scores again"

    for snippet in blocks("python"):
        (checkout / "snippet.py").write_text(snippet, encoding="utf-8")
        run(checkout, "python snippet.py")
    assert (checkout / "runs/edited_from_python/config.json").is_file()
    from_python = json.loads((checkout / "runs/python/results.json").read_text())
    assert from_python["retained"] == results["retained"], "the ten lines of Python are the demo"


def test_the_row_of_data_is_read(checkout: Path) -> None:
    (record,) = read_records("edits", checkout / "edits.jsonl")
    assert record.rephrases and record.locality


def test_the_map_names_every_folder_and_callback() -> None:
    layout = README.split("## Layout")[1].split("## Citation")[0]
    lines = [line for line in layout.splitlines() if line.startswith("    ")]
    assert len(lines) <= 25
    map_of_it = "\n".join(lines)
    for folder in ("stableedit_pl", "scripts"):
        for entry in (ROOT / folder).iterdir():
            hidden = entry.name.startswith(("_", ".")) or entry.name in ("environment.sh", "callbacks")
            assert hidden or entry.name in map_of_it, entry.name
    from stableedit_pl import callbacks

    assert all(name in map_of_it for name in callbacks.__all__)


def test_the_nine_stops_of_an_edit_are_there() -> None:
    stops = re.findall(r"^(\d)\. `([\w/.]+\.py): (\w+)`", README, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in stops] == list(range(1, 10))
    for _, file, name in stops:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in named, f"{file} has no {name}"


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
