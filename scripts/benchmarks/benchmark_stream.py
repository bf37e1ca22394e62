"""Two thousand turns of the demo: is a turn as fast at the end as at the beginning, and what does a checkpoint cost?

    python scripts/benchmarks/benchmark_stream.py --turns 2000 --out stream.json

Edits the demo model with a long stream in turns of 20, a checkpoint and a stability point every 10 turns, and prints
per tenth of the run the median time of a turn (processor time, which other programs disturb least, and wall-clock
time), resident memory, and the median time of writing a checkpoint. Exits with 1 when the last tenth takes more than
1.05 times the processor time of the first, memory grows by 1 MB per 10,000 edits, or a checkpoint costs more than a
turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from long_stream import write_retargeted
from measuring import machine, quiet, resident_megabytes, slope

from stableedit_pl import EditStream, EditTrainer, LifelongEditor
from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor, TurnCheckpoint

TURN_SIZE = 20


class Timed(TurnCheckpoint):
    """Saves as always, timed; comes last in a turn, so that it sees all of it."""

    def __init__(self, every_n_turns: int) -> None:
        """See the base class."""
        super().__init__(every_n_turns=every_n_turns)
        self.lines: list[dict[str, float]] = []
        self.saves: list[tuple[int, float]] = []
        self.before = (time.perf_counter(), time.process_time())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the turn, then save if it is time to; the next turn is counted from there."""
        wall, cpu = time.perf_counter() - self.before[0], time.process_time() - self.before[1]
        self.lines.append({"wall": wall, "cpu": cpu})
        started = time.perf_counter()
        due = self._due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if due:
            self.saves.append((len(self.lines), time.perf_counter() - started))
            self.lines[-1]["megabytes"] = resident_megabytes()
        self.before = (time.perf_counter(), time.process_time())


def main() -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="where the figures are saved as JSON")
    arguments = parser.parse_args()
    quiet()
    timed = Timed(every_n_turns=10)
    with tempfile.TemporaryDirectory() as folder:
        write_retargeted(arguments.turns * TURN_SIZE, Path(folder) / "stream.jsonl")
        trainer = EditTrainer(
            run_dir=f"{folder}/run",
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[
                EditEvaluation(every_n_turns=None, sample_size=1, final=False),
                StabilityMonitor(every_n_turns=10),
                timed,
            ],
        )
        editor = LifelongEditor(
            base_model="demo",
            model_dtype="float32",
            sites=["model.layers.1.mlp.down_proj"],
            step_size=1e-4,
            ridge=10.0,
            passes=1,
        )
        trainer.fit(editor, datamodule=EditStream(path=f"{folder}/stream.jsonl", turn_size=TURN_SIZE))
    lines, rows = timed.lines, []
    print(machine("cpu"))
    print("    turns   turn ms (processor)   turn ms (wall)   save ms       MB")
    for tenth in range(10):
        low, high = len(lines) * tenth // 10, len(lines) * (tenth + 1) // 10
        row = {name: 1000 * statistics.median(line[name] for line in lines[low:high]) for name in ("cpu", "wall")}
        row["save"] = 1000 * statistics.median(seconds for turn, seconds in timed.saves if low < turn <= high)
        row["megabytes"] = max(line["megabytes"] for line in lines[low:high] if "megabytes" in line)
        rows.append(row)
        print(f"{high:9,}{row['cpu']:22.1f}{row['wall']:17.1f}{row['save']:10.1f}{row['megabytes']:9.1f}")
    points = [(float(turn * TURN_SIZE), line["megabytes"]) for turn, line in enumerate(lines) if "megabytes" in line]
    growth = 10_000 * slope(points[len(points) // 5 :])
    ratio, saving = rows[-1]["cpu"] / rows[0]["cpu"], rows[-1]["save"] / rows[-1]["wall"]
    print(
        f"last tenth over first: {ratio:.3f}; memory {growth:+.3f} MB per 10,000 edits; a save costs {saving:.2f} turns"
    )
    if arguments.out:
        figures = {"machine": machine("cpu"), "rows": rows, "ratio": ratio, "growth": growth, "saving": saving}
        arguments.out.write_text(json.dumps(figures, indent=1))
    return 0 if ratio <= 1.05 and growth < 1 and saving < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
