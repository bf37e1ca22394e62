"""Start-up: how long until the command answers, until the first turn, and until all rows are checked.

    python scripts/benchmarks/benchmark_startup.py --repeats 5 --out startup.json

Every figure is taken in fresh processes: median and spread of wall time and of processor time. The first turn is there
when the ledger of the demo run has its first line; the run is then killed. Rows are those of
scripts/endurance/soak.py (the demo's prompts and targets over and over), and the same rows with their number put behind
every text, so that no text recurs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "stableedit_pl"]
CHECK = """
import logging, sys, time
from pathlib import Path
from stableedit_pl.model.encoding import Encoder
from stableedit_pl.model.loading import context_length, load_tokenizer
from stableedit_pl.data.readers import read_records
from stableedit_pl.data.record_encoding import RecordEncoder

how, file = sys.argv[1:]
logging.disable(logging.WARNING)
began = time.perf_counter(), time.process_time()
def took():
    return time.perf_counter() - began[0], time.process_time() - began[1]
if how == "reading":
    read_records("edits", file)
else:
    records = read_records("edits", file)
    encoder = RecordEncoder(Encoder(load_tokenizer("demo"), context_length("demo")), Path(file))
    encoder.encoder.encode("a", "b")
    began = time.perf_counter(), time.process_time()
    if how == "batches":
        encoder.check(records)
    else:
        for record in records:
            encoder.scored(record)
print(*took())
"""

Seconds = tuple[float, float]


def spent(process: subprocess.Popen[Any]) -> float:
    """Processor seconds of a process that is about to end."""
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def command(*arguments: str) -> Seconds:
    """Run the command to its end."""
    began = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    cpu = spent(process)
    return time.perf_counter() - began, cpu


def first_turn() -> Seconds:
    """Launch the demo run, and wait for its first committed turn."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "run/edits.jsonl"
        began = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, "fit", "--config", "configs/demo.yaml", f"--run_dir={folder}/run"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        while not (ledger.exists() and ledger.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"the demo run ended with code {process.returncode} before its first turn")
            time.sleep(0.01)
        wall = time.perf_counter() - began
        process.kill()
        return wall, spent(process)


def rows(how: str, file: Path) -> Seconds:
    """Read or check a file of rows in a process of its own, which takes the time itself."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, how, str(file)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


def write_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """The soak's rows, and the same with texts that do not recur."""
    from long_stream import retargeted, write_retargeted

    recurring, distinct = folder / "recurring.jsonl", folder / "distinct.jsonl"
    write_retargeted(count, recurring)
    with distinct.open("w", encoding="utf-8") as out:
        for row in retargeted(count):
            number = row["id"]
            changed = {"prompt": f"{row['prompt']} {number}", "target": f"{row['target']} {number}"}
            out.write(json.dumps(row | changed) + "\n")
    return recurring, distinct


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "threads": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "transformers", "tokenizers", "jsonargparse")},
    }


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each figure")
    parser.add_argument("--rows", type=int, default=100_000, help="rows that are read and checked")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"\n{'':<44}{'wall s':>9}{'min':>8}{'max':>8}{'cpu s':>9}{'min':>8}{'max':>8}")
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recurring, distinct = write_rows(Path(folder), arguments.rows)
        cases: dict[str, Callable[[], Seconds]] = {
            "--help": lambda: command("--help"),
            "fit --help": lambda: command("fit", "--help"),
            "verify --help": lambda: command("verify", "--help"),
            "demo: launch to first turn": first_turn,
            f"read {arguments.rows:,} rows": lambda: rows("reading", recurring),
            "check them, texts recur: batches": lambda: rows("batches", recurring),
            "check them, texts recur: row by row": lambda: rows("row by row", recurring),
            "check them, no text recurs: batches": lambda: rows("batches", distinct),
            "check them, no text recurs: row by row": lambda: rows("row by row", distinct),
        }
        # Round by round, so that a machine that slows down does so for all of them.
        taken: dict[str, list[Seconds]] = {name: [] for name in cases}
        for _ in range(arguments.repeats):
            for name, measure in cases.items():
                taken[name].append(measure())
        for name, pairs in taken.items():
            wall, cpu = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            cells = [f(each) for each in (wall, cpu) for f in (statistics.median, min, max)]
            print(f"{name:<44}" + "".join(f"{c:>{9 if i % 3 == 0 else 8}.2f}" for i, c in enumerate(cells)))
            figures[name] = {"wall_seconds": wall, "cpu_seconds": cpu}
    if arguments.out is not None:
        saved = {"machine": about, "rows": arguments.rows, "figures": figures}
        arguments.out.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
